"""A model that a method keeps beside the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qsdp import checkpoint
from qsdp.common.printing import print_error
from qsdp.common.user_errors import UserError, quoted
from qsdp.train.history import HistoryFolder
from qsdp.train.verify_together import verify_together
from qsdp.train.world import World


@dataclass
class KeptModel:
    """The weights of least loss in a folder of OUT; see ``methods.method.MethodCheckpoint``."""

    folder: str
    world: World
    results: HistoryFolder
    damaged: set[Path]
    """What is as if it were not there, by real paths."""
    write: Callable[[int, float], None]
    """Writes the weights after so many steps, of this validation loss."""
    why_none: str = "there was nothing to keep"
    _has_written: bool = False

    def keep(self, steps_done: int, loss: float) -> None:
        """Write the weights, of validation loss ``loss``, in place of what was kept before."""
        self.write(steps_done, loss)
        self._has_written = True

    def loss(self) -> float | None:
        """The validation loss of what was kept so far; None without that. A collective.

        Rank 0 says of what is damaged or cannot be read that it counts as none.
        """
        world, name = self.world, self.folder.replace("-", " ")
        latest = partial(self.results.latest_kept, self.folder, self.damaged)
        try:
            while path := world.on_main(latest):
                error = None if self._has_written else verify_together(path, world)
                if error is None:
                    return world.on_main(partial(_read_loss, path))
                self.damaged.add(path.resolve())
                self.why_none = error.fact
                if world.is_main:
                    print_error(
                        f"warning: {self.why_none}, and the {name} of step "
                        f"{checkpoint.step_of(path)} counts as none."
                    )
        except UserError as error:
            self.why_none = f"it cannot be read ({quoted(error)})"
            if world.is_main:
                print_error(
                    f"warning: the {name} in {self.results.out} cannot be read ({quoted(error)})."
                )
        return None


def _read_loss(path: Path) -> float:
    loss = checkpoint.read_meta(path).get("val_loss")
    if not isinstance(loss, float | int):
        raise ValueError(f"{path} states no validation loss.")
    return float(loss)
