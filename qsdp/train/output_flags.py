"""The flags that say what a run keeps, where, and from what it goes on. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from qsdp.common.flags import Flags


@dataclass(frozen=True, kw_only=True)
class OutputFlags(Flags):
    """What is kept, how often, where, and from what a run goes on."""

    out: str | None = None
    """Folder for all results, seen by every node.
    Unset: out/MODEL-DATA-..., another one for every setting that changes a run's numbers.
    """

    eval_every: int = 250
    """Steps between validations, 0 for one at the end only."""

    eval_batches: int = 50
    """Validation batches of --batch-size a rank, fewer where the validation split ends."""

    save_every: int = 500
    """Steps between checkpoints, 0 for one at the end only."""

    save_async: bool = False
    """Write checkpoints while training goes on, except the first one of each start.
    A save takes as long as a copy of this rank's part of the weights and of the optimizer's
    state, which stays in host memory until it is on disk. The next save, and the end, wait for
    it.
    """

    keep: int = 2
    """How many of the newest checkpoints stay on disk."""

    resume: str = "auto"
    """auto, none, or the path to go on from: a checkpoint or a folder of them.
    auto goes on from the newest checkpoint in --out, if any, which must be of the same run:
    every setting that changes its numbers, its data and the number of ranks. One that is
    damaged is passed over, aloud. A path goes on from there with other settings, if they are of
    the same model and method; the same command again then goes on from the newest one that came
    of it. So does the folder of --out itself, which may be empty still: for a job that may be
    started again on another number of ranks. none begins anew. What --out holds of later steps
    goes when the first new checkpoint is on disk.
    """

    take_over: bool = False
    """Take --out from a run that holds it and is alive, or on a machine of which nothing is known.
    That run ends when it saves next.
    """

    tensorboard: bool = False
    """Also write TensorBoard events to OUT/tensorboard."""

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what no run can have."""
        for name in ("eval_batches", "keep"):
            self.require(name, getattr(self, name) >= 1, "choose 1 or more")
        for name in ("eval_every", "save_every"):
            self.require(name, getattr(self, name) >= 0, "choose 0 or more")
        self.require("out", self.out != "", "give a folder")
        self.require("resume", self.resume != "", "choose auto, none or a checkpoint's path")
        if self.save_async and not self.save_every:
            raise ValueError(
                "--save-async is given, but --save-every is 0, and the end waits for the only "
                "checkpoint anyway: raise --save-every, or leave --save-async out."
            )
