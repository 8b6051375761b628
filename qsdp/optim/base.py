"""What the optimizers share: exact gradient norms over shards, and a wrapper around a base."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, ParamSpec, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsdp.compat import abandon_pass, all_gather, reshard, reshards_after_backward, rewind_point
from qsdp.meeting import groups_of, meet, mistakes_shared
from qsdp.sparsity.compression import Prunable
from qsdp.sparsity.shards import Groups, local_shard, unique

P = ParamSpec("P")

# A chunk in double precision stays in a CPU's cache; a GPU wants few launches instead.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 24


def global_grad_norm(parameters: Iterable[Tensor]) -> float:
    """The 2-norm of all gradients together, in double precision, the same on every rank.

    Every rank adds the squares of its shards in fp64; the ranks' sums are gathered and added in
    rank order, so the result does not depend on the order of arrival. A plain or replicated
    parameter (also an HSDP replica's) counts once; its gradient is taken to be the same on every
    rank, and the first rank's is the one counted. A collective if any parameter is a DTensor,
    whatever the gradients: a rank may have none.

    Args:
        parameters: Plain tensors or DTensors, the same on every rank; those without a gradient
            add nothing, a tied one counts once.

    Returns:
        The norm: not finite on all ranks if a gradient is not finite on any; 0.0 without gradients.
    """
    grads: dict[Groups, list[Tensor]] = {}
    devices: dict[Groups, torch.device] = {}
    for parameter in unique(parameters):
        if parameter.grad is None and not parameter.requires_grad:
            continue
        shard = local_shard(parameter if parameter.grad is None else parameter.grad)
        devices.setdefault(shard.groups, shard.device)
        grads.setdefault(shard.groups, []).extend([] if parameter.grad is None else [shard.values])
    sums = {groups: _sum_of_squares(grads[groups], device) for groups, device in devices.items()}
    whole = float(sums.pop((), 0.0))
    total, wholes = 0.0, [whole]
    for groups, part in sums.items():
        # The wholes ride along: a rank whose own is not finite must tell the others.
        rows = torch.stack([part, torch.full_like(part, whole)])
        for group in groups:
            gathered = rows.new_empty(dist.get_world_size(group) * rows.numel())
            all_gather(gathered, rows, group)
            rows = gathered
        values = rows.tolist()
        wholes = values[1::2]
        for value in values[::2]:
            total += value
    counted = wholes[0] if all(map(math.isfinite, wholes)) else math.nan
    return math.sqrt(total + counted)


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients in place so that their global norm is at most ``max_norm``.

    As `torch.nn.utils.clip_grad_norm_`, but exact for DTensors of any mesh together with plain
    tensors: the coefficient max_norm / (norm + 1e-6), at most 1, is computed in fp64 and applied
    in the gradients' precision (at least fp32). A norm that is not finite makes every coefficient
    NaN or 0, as in torch: look at the returned norm before stepping.

    Args:
        parameters: As for `global_grad_norm`.
        max_norm: Above 0, the same on every rank.

    Returns:
        The norm before clipping.
    """
    parameters = unique(parameters)
    groups, call = groups_of(parameters), "qsdp.clip_grad_norm_"
    with mistakes_shared(call, groups):
        check_max_norm(max_norm)
    num_trained = sum(parameter.requires_grad for parameter in parameters)
    meet(call, {"max_norm": max_norm, "trained parameters": num_trained}, groups)
    norm = global_grad_norm(parameters)
    scale_grads_(parameters, max_norm, norm)
    return norm


def scale_grads_(parameters: Iterable[Tensor], max_norm: float, norm: float) -> None:
    """Clip to ``max_norm`` the gradients whose global norm is known to be ``norm``."""
    coefficient = max_norm / (norm + 1e-6)
    if coefficient >= 1:
        return
    for parameter in unique(parameters):
        if parameter.grad is not None:
            local_shard(parameter.grad).values.mul_(coefficient)


def check_max_norm(max_norm: float) -> None:
    """Raise ValueError unless ``max_norm`` is above 0."""
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; choose a number above 0")


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares in fp64, a scalar tensor on ``device``, without a full fp64 copy."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = _CHUNK_CPU if total.device.type == "cpu" else _CHUNK_GPU
    for values in tensors:
        for chunk in values.reshape(-1).split(size):
            wide = chunk.double()
            total += wide.dot(wide).to(total.device)
    return total


def _described(value: object) -> str:
    """``value`` in words that do not depend on the process or its GPU."""
    if isinstance(value, Mapping):
        pairs = (f"{name!r}: {_described(each)}" for name, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, Tensor):
        return str(value.tolist())
    is_plain = value is None or isinstance(value, str | int | float) or is_dataclass(value)
    return repr(value) if is_plain else type(value).__name__


def made_alike(init: Callable[P, None]) -> Callable[P, None]:
    """Make a constructor ``(self, model, base_optimizer, ...)`` a collective over the ranks that
    share the model: all of them raise RuntimeError if their arguments differ."""
    signature = inspect.signature(init)

    @wraps(init)
    def made(*args: P.args, **options: P.kwargs) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        self, model, _ = (bound.arguments.pop(name) for name in ("self", "model", "base_optimizer"))
        facts: dict[str, object] = {
            name: _described(value) for name, value in bound.arguments.items()
        }
        groups = []
        if isinstance(model, nn.Module):
            reshard(model)
            groups = groups_of(model.parameters())
        call = f"qsdp.{type(self).__name__}"
        with mistakes_shared(call, groups):
            init(*args, **options)
            facts["prunable parameters"] = self.prunable.names
            facts["base_optimizer"] = f"{type(self.base).__name__} {_described(self.base.defaults)}"
            facts["parameters of the optimizer"] = len(self.parameters())
        meet(call, facts, groups)

    return made


@contextmanager
def undone_by_exceptions(model: nn.Module) -> Iterator[None]:
    """An exception inside leaves ``model`` as if no pass had been begun inside: the next try of the
    step gathers the same weights. Gradients that were not reduced are dropped."""
    rewind = rewind_point(model)
    try:
        yield
    except BaseException:
        abandon_pass(model)
        rewind()
        raise


class TellSupport(Protocol):
    """Takes the masks of pruned parameters, None for whole weights; ``with_grads``: gradients of
    pruned weights are not needed either."""

    def __call__(
        self, masks: Mapping[nn.Parameter, Tensor] | None, *, with_grads: bool = True
    ) -> None: ...


class OptimizerWrapper(torch.optim.Optimizer):
    """An optimizer that does something around the steps of another, and shares all it has.

    `param_groups` and `state` are the base's own objects, so learning-rate schedulers, DCP's
    `get_optimizer_state_dict` and the user may hold either of the two. What the wrapper must
    remember between steps stands in the parameter groups, under its own keys: `state_dict` and DCP
    save and restore it with them.
    """

    def __init__(self, base: torch.optim.Optimizer, remembered: dict[str, Any]) -> None:
        """Wrap ``base``; ``remembered`` are keys of the parameter groups with initial values."""
        if not isinstance(base, torch.optim.Optimizer):
            raise ValueError(
                f"the base optimizer is a {type(base).__name__}; give a torch.optim.Optimizer"
            )
        if isinstance(base, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ValueError(
                f"the base optimizer is {type(base).__name__}; give one whose step() needs no "
                "closure and takes dense gradients, such as AdamW"
            )
        self.base = base
        self._remembered = remembered
        self._tell: TellSupport | None = None
        super().__init__([p for group in base.param_groups for p in group["params"]], {})
        self.defaults = base.defaults
        # Loading gives the base new lists and dictionaries.
        base.register_load_state_dict_post_hook(self._share)
        self._share(base)

    def share_support(self, tell: TellSupport) -> None:
        """Call ``tell`` from now on when the weights that are not zero change: for instance
        `Handle.set_support`, so that a pruned weight costs nothing on the wire."""
        self._tell = tell

    def parameters(self) -> list[Tensor]:
        """All parameters of the base optimizer, in its order."""
        return [parameter for group in self.base.param_groups for parameter in group["params"]]

    def prunable_of(self, model: nn.Module, patterns: Sequence[str] | None) -> Prunable:
        """The prunable set of ``model``.

        Raises ValueError if the base optimizer lacks some of it.
        """
        prunable = Prunable.of(model, patterns)
        known = {id(parameter) for parameter in self.parameters()}
        pairs = zip(prunable.names, prunable.parameters, strict=True)
        missing = [name for name, p in pairs if p.requires_grad and id(p) not in known]
        if missing:
            raise ValueError(
                f"the base optimizer lacks {len(missing)} prunable parameters, {missing[0]!r} "
                "first; make it of all the model's parameters, after sharding"
            )
        return prunable

    def check_reshards(self, model: nn.Module) -> None:
        """Raise RuntimeError if FSDP2 would hide edits of the shards from the next pass."""
        if not reshards_after_backward(model):
            raise RuntimeError(
                f"{type(self).__name__} edits the weights between two passes, which "
                "set_reshard_after_backward(False) would hide from the second; leave it at True"
            )

    def meet(self, edited: nn.Module | None, **facts: object) -> None:
        """Make sure that all ranks are about to take the same step. A collective when sharded.

        ``edited``: a model for `check_reshards`.
        """
        parameters, call = self.parameters(), f"{type(self).__name__}.step"
        groups = groups_of(parameters)
        if edited is not None:
            with mistakes_shared(call, groups):
                self.check_reshards(edited)
        facts["trained parameters"] = sum(parameter.requires_grad for parameter in parameters)
        meet(call, facts, groups)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dictionary, with what the wrapper remembers in its groups."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this wrapper, or of a bare base optimizer."""
        self.base.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: torch copies optimizers without what holds them to a
        model."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; copy the model, make another "
            "around it, and give that load_state_dict(copy.deepcopy(optimizer.state_dict()))"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the base optimizer another group of parameters."""
        super().add_param_group(param_group)
        self._remember_defaults()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; each wrapper says what it does around the base's."""
        raise NotImplementedError

    def _recall(self, key: str) -> Any:
        return self.base.param_groups[0][key]

    def _remember(self, key: str, value: int | float) -> None:
        for group in self.base.param_groups:
            group[key] = value

    def _share(self, base: torch.optim.Optimizer) -> None:
        self.param_groups = base.param_groups
        self.state = base.state
        self._remember_defaults()

    def _remember_defaults(self) -> None:
        for group in self.param_groups:
            for key, value in self._remembered.items():
                group.setdefault(key, value)
