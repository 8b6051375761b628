"""Which of a model's parameters an optimizer steps and prunes, by their names.

What stands in a parameter's place may be another object tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsdp.common.meshes import groups_of
from qsdp.common.rank_agreement import warn
from qsdp.common.replicas import replicas_of
from qsdp.common.spread import spread_of
from qsdp.common.user_errors import counted, names_for_user
from qsdp.compat.sharded_parameters import sharded_by_unsharded_id, sharded_parameters
from qsdp.sparsity.prunable import Prunable, prunable_parameters

_ADVICE = (
    "make it of the model's parameters, after sharding, or put into its param_groups what "
    "sharding, load_state_dict(assign=True) or to_empty has put in place of the old ones (an "
    "engine that steps partitions of its own, as ZeRO does, cannot be wrapped)"
)


class TrackedParameters:
    """The parameters that ``owner``, an optimizer around ``base``, tracks of ``model``.

    It keeps no parameter alive, and what it looks at stays as it is: one rank may look alone. It
    says

    - ``prunable_names``: those of the prunable parameters;
    - ``prunable_ids``: these names by what ``id`` was of the parameters when they were found;
    - ``groups``: whose ranks share the parameters of both, or are replicas; see ``groups_of``;
    - ``spread``: that of these, HSDP's included; see ``spread_of``;
    - ``trained_names``: of those of both that need gradients;
    - ``missing_names``: of the model's that need gradients and that the base does not have.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        base: torch.optim.Optimizer,
        patterns: Sequence[str] | None,
    ) -> None:
        """Find the parameters. Raises ValueError if the base lacks prunable parameters, or all."""
        self._owner, self._model, self._base, self._patterns = owner, model, base, patterns
        self.prunable_names = Prunable.of(model, patterns).names
        self._stepped_ids: dict[str, int] = {}
        self._late: set[str] = set()
        self._look_up()

    @property
    def prunable(self) -> Prunable:
        """The prunable parameters as they were found the last time; changes show at a step."""
        everyone = self.base_parameters()
        if min(self._positions, default=0) < 0:  # some are frozen, which the base need not have
            behind = sharded_by_unsharded_id(self._model)
            everyone += [behind.get(id(p), p) for p in reversed([*self._model.parameters()])]
        count = len(everyone)
        found = [everyone[at] for at in self._positions if -count <= at < count]
        if [*map(id, found)] != [*self.prunable_ids]:
            self.refresh()
            return self.prunable
        parameters: Any = tuple(found)
        return replace(self._prunable, parameters=parameters)

    @property
    def is_current(self) -> bool:
        """Whether model and base still have and train these parameters, with these replicas."""
        parameters = [*self._model.parameters()]
        if self._model_ids != [*map(id, parameters)]:
            behind = sharded_by_unsharded_id(self._model)
            parameters = [behind.get(id(p), p) for p in parameters]
        return (
            self._model_ids == [*map(id, parameters)]
            and self._base_ids == [*map(id, self.base_parameters())]
            and self._requires_grad == [parameter.requires_grad for parameter in parameters]
            and self._replicas == replicas_of([*parameters, *self.base_parameters()])
        )

    def refresh(self) -> None:
        """Look the parameters up again, if the model has others.

        Raises RuntimeError unless the base has those too.
        """
        try:
            if not self.is_current:
                self._look_up()
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def base_parameters(self) -> list[Tensor]:
        """All parameters of the base, in its order."""
        return [parameter for group in self._base.param_groups for parameter in group["params"]]

    def record_base_parameters(self) -> None:
        """Remember which of the model's parameters the base has now."""
        self._record(sharded_parameters(self._model), {*map(id, self.base_parameters())})

    def _record(self, named: Mapping[str, Tensor], known: set[int]) -> None:
        # Of what the model has dropped the number may soon be another object's.
        kept = {name: was for name, was in self._stepped_ids.items() if name in named}
        self._stepped_ids = kept | {name: id(p) for name, p in named.items() if id(p) in known}

    def _look_up(self) -> None:
        """Take the parameters that the model has now under the names that were chosen.

        Raises ValueError unless the base has them.
        """
        named, own = sharded_parameters(self._model), self.base_parameters()
        known = {id(parameter) for parameter in own}
        names = self.prunable_names
        prunable = Prunable.named(self._model, names)
        trained = [name for name, p in named.items() if p.requires_grad]
        missing = [name for name in trained if id(named[name]) not in known]
        replaced = {name for name, was in self._stepped_ids.items() if id(named.get(name)) != was}
        if lost := [name for name in missing if name in {*names} | replaced]:
            what = "prunable parameter" if lost[0] in names else "parameter"
            raise ValueError(
                f"the base optimizer lacks {counted(len(lost), what)} of the model, {lost[0]!r} "
                f"first: {_ADVICE}."
            )
        if trained and len(missing) == len(trained):
            raise ValueError(
                f"the base optimizer has no trained parameter of the model: {_ADVICE}."
            )
        self._check_state(replaced)
        self.missing_names = tuple(missing)
        self.trained_names = tuple(n for n in trained if n in names or n not in missing)
        parameters = [*named.values()]
        numbers = [*map(id, parameters)]
        in_model = {*numbers}
        self._warn_of_mismatch([p for p in own if id(p) not in in_model])
        everything = [*parameters, *own]
        self._replicas = replicas_of(everything)
        self.groups = groups_of(everything, with_replicas=True)
        self.spread = spread_of(everything, with_replicas=True)
        # Numbers of objects alone: references would keep the unsharded model, and torch swaps the
        # insides of no tensor that has weak ones.
        self.prunable_ids = {
            id(p): name for p, name in zip(prunable.parameters, names, strict=True)
        }
        self._prunable = replace(prunable, parameters=())
        self._model_ids, self._base_ids = numbers, [*map(id, own)]
        positions = {key: -1 - i for i, key in enumerate(self._model_ids)}
        positions |= {key: i for i, key in enumerate(self._base_ids)}
        self._positions = [positions[key] for key in self.prunable_ids]
        self._requires_grad = [parameter.requires_grad for parameter in parameters]
        self._record(named, known)

    def _check_state(self, replaced: Iterable[str]) -> None:
        """Raise ValueError if a state would stay with parameters that others have replaced."""
        state: Any = self._base.state
        with_state = {id(key) for key in state if isinstance(key, Tensor)}
        if any(self._stepped_ids[name] in with_state for name in replaced):
            raise ValueError(
                f"the state of {type(self._base).__name__} is of parameters that others have "
                "replaced, and stays with them: replace parameters before the first step, or make "
                "both optimizers anew and load the state_dict()."
            )

    def _warn_of_mismatch(self, others: Sequence[Tensor]) -> None:
        """Say what base and model do not have in common, where that may be a mistake."""
        if others and self.missing_names:
            warn(
                f"the base optimizer of {self._owner} has {counted(len(others), 'parameter')} that "
                f"the model does not have, and lacks {len(self.missing_names)} that it trains, "
                f"{self.missing_names[0]!r} first: if these are the same, {_ADVICE}."
            )
        elif any(isinstance(parameter, DTensor) for parameter in others):
            warn(
                f"the base optimizer of {self._owner} has sharded parameters outside of the model, "
                "and what an exception in their passes leaves behind is not undone: give a module "
                "that holds all of them, nn.ModuleList for one."
            )

    def warn_of_late_parameters(self) -> None:
        """Say which parameters would be prunable and came too late. Frees what is gathered."""
        now = prunable_parameters(self._model, self._patterns)
        late = [n for n, p in now.items() if p.requires_grad and n not in self.prunable_names]
        new = [name for name in late if name not in self._late]
        self._late = {*late}
        if new:
            warn(
                f"{names_for_user(new)} came after {self._owner} was made, which does not prune "
                "what was not there: make it anew."
            )
