"""What a training method brings for the trainer: its flags, and what follows. No torch here.

A method is a folder of this room: ``flags.py`` with a ``Method``, the optimizer that it wraps
around AdamW, and one line in ``registry.py``. Nobody else names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from qsdp.common.flags import Flags, flag

if TYPE_CHECKING:
    import torch
    from torch import nn


class RunSettings(NamedTuple):
    """What a method's optimizer is told of the run."""

    steps: int
    """Optimizer steps in all."""
    seed: int
    max_norm: float | None
    """The norm that the gradient is clipped to; None for no clipping."""
    prunable: list[str] | None
    """Patterns of --prunable; None for the weights of linear layers in blocks."""


@dataclass(frozen=True, kw_only=True)
class Method(Flags):
    """How the optimizer prepares the model for compression. This one is plain AdamW, without flags.

    A subclass has the field ``KEY``, which chooses it, and others named KEY_...: the flags
    ``--KEY`` and ``--KEY-...``, whose help is the fields' docstrings. Their types are those of
    ``train/config_file.py``. All that a run knows of its method, it asks here.
    """

    KEY: ClassVar[str] = ""
    NAME: ClassVar[str] = "AdamW"
    """What the summary and the checkpoints call it."""
    PASSES: ClassVar[int] = 1
    """Forward and backward passes a step."""
    PRUNES: ClassVar[bool] = False
    """Whether it compresses the prunable weights, so that it heeds --prunable."""
    IS_TIMED_BY_VALIDATION: ClassVar[bool] = False
    """Whether what the run keeps depends on when it validates."""
    INSTEAD: ClassVar[Mapping[str, str]] = {}
    """Fields that nothing heeds beside another, which says the same in place of it."""
    OF_THE_SCHEDULE: ClassVar[tuple[str, ...]] = ()
    """Fields that count by the ``schedule`` that they come to."""
    FOLDERS: ClassVar[tuple[str, ...]] = ()
    """Folders of OUT in which it keeps models, which nothing else has; see ``MethodCheckpoint``."""
    IS_IN_EVERY_IDENTITY: ClassVar[bool] = False
    """Whether its flags tell runs without it apart too: the names of their folders were made so."""

    @property
    def is_chosen(self) -> bool:
        """Whether the run has this method."""
        return bool(getattr(self, self.KEY))

    @property
    def title(self) -> str:
        """What a run says of its method as it begins."""
        return self.NAME

    @property
    def details(self) -> str:
        """What sets a run apart from others of this method, for the name of its folder."""
        return ""

    @property
    def given(self) -> list[str]:
        """The fields that are not as they are by default."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    def identity(self) -> dict[str, Any]:
        """The settings that change a run's numbers, as JSON holds them, except the schedule's."""
        return {n: value for n, value in self.stored().items() if n not in self.OF_THE_SCHEDULE}

    def schedule(self, steps: int) -> Any:
        """When masks change in a run of ``steps``, as a dataclass; None where there are none."""
        return None

    def learning_rate_cycle(self, step: int, steps: int) -> tuple[int, int] | None:
        """Where step number ``step``, the first being 0, stands in a cycle of the learning rate.

        It comes with how many steps the cycle has; None where the run is one cycle.
        """
        return None

    def check_values(self) -> None:
        """Raise ValueError for a value that cannot be, whether the method is chosen or not."""

    def check_run(self, steps: int) -> None:
        """Raise ValueError for what no run of ``steps`` with this method can have."""

    def check_heeded(self, given: Iterable[str]) -> None:
        """Raise ValueError if one of the fields ``given`` has no effect.

        It is for a method that is not chosen, or does nothing beside others: also where it is given
        as it is by default.
        """
        own = self.values().keys() - {self.KEY}
        for name in (name for name in given if name in own):
            if not self.is_chosen:
                raise ValueError(
                    f"{self.as_given(name)} is given without {flag(self.KEY)}, so that nothing "
                    "would heed it: add that, or leave it out."
                )
            other = self.INSTEAD.get(name)
            if other is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{flag(name)} is given beside {flag(other)}, which stands in place of it: "
                    "leave one of the two out."
                )
            if (missing := self.company(name)) is not None:
                raise ValueError(f"{self.as_given(name)} is for {missing}, or leave it out.")

    def company(self, name: str) -> str | None:
        """What the field ``name`` needs that is not there, and what to do.

        None where the others let it count.
        """
        return None

    def wrap(
        self, model: nn.Module, base: torch.optim.Optimizer, settings: RunSettings
    ) -> torch.optim.Optimizer:
        """The optimizer of a run: an ``OptimizerWrapper`` around ``base``.

        ``base`` is an AdamW that has all parameters of ``model``, which is sharded by FSDP2 and
        initialised. Raises ValueError where the model cannot be compressed as asked.
        """
        return base

    def companion(self, run: MethodRun) -> Companion:
        """What the method does beside the steps of ``run``, which is ready to take the next."""
        return Companion()


class Companion:
    """What a method does beside the steps of a run: nothing, here. Called on all ranks alike."""

    def after_validation(self, steps_done: int, loss: float) -> None:
        """Hear that the weights after ``steps_done`` have the validation loss ``loss``.

        After the last step too; once more, with the same weights, where a finished run is told to
        write its results again.
        """

    def outcome(self) -> Outcome:
        """What came of it, as the run ends."""
        return Outcome()


class Outcome(NamedTuple):
    """What came of what a method did beside the steps."""

    results: Mapping[str, Any] = {}
    """What is added to summary.json: losses of kept models as NAME_val_loss."""
    remark: str | None = None
    """What the run says of it in the end, on rank 0."""


class MethodCheckpoint(Protocol):
    """What a method keeps: the best of some weights of a run, as a checkpoint in a folder of OUT.

    A run that goes on finds what it kept.
    """

    why_none: str
    """Why nothing was kept, as long as nothing was."""

    def keep(self, steps_done: int, loss: float) -> None:
        """Write the weights, of validation loss ``loss``, in place of what was kept before."""

    def loss(self) -> float | None:
        """The validation loss of what was kept so far; None without that. A collective.

        What is damaged or cannot be read counts as none, which rank 0 says.
        """


class MethodRun(Protocol):
    """What a method sees of a run. Called on all ranks alike."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What ``wrap`` made."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps that were taken."""

    def validation_loss(self) -> float:
        """The validation loss of the exact weights, in nats a token."""

    def zero_fraction(self) -> float:
        """The fraction of the prunable weights that are zero."""

    def kept_model(self, folder: str) -> MethodCheckpoint:
        """The model that is kept in ``folder``, which is one of ``Method.FOLDERS``."""
