"""The flags of ``qsdp evaluate``, and the targets that they come to. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qsdp.oneshot.registry import SOLVERS, chosen_method
from qsdp.sparsity.compression_target import Compression
from qsdp.train.run_flags import RunFlags

SPLITS = ("val", "test")
TARGETS = "0.5,0.6,0.7,0.8,0.9,2:4,4bit"


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Loss and perplexity of one dense model, as it is and compressed to each of many targets.

    It prints a table, with --out it also writes evaluation.json and a plot. One process holds the
    whole model and a copy of its prunable weights. A model too large for that runs under torchrun,
    sharded over the ranks by FSDP2:

    torchrun --nproc-per-node 8 -m qsdp evaluate CHECKPOINT --out DIR

    The figures are of the same sequences on any number of ranks.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint's folder step-..., a run's folder (its newest checkpoint), or an export.
    An export is what qsdp compress wrote.
    """

    targets: str | None = None
    """What to compress to, with commas between; none for the model as it is.
    Fractions (0.7), N:M patterns (2:4), bits (4bit); + joins terms (2:4+4bit, 0.7+layer,
    0.5+block4). Unset: 0.5,0.6,0.7,0.8,0.9,2:4,4bit for a checkpoint, none for an export.
    """

    method: Annotated[str | None, tyro.conf.arg(metavar="|".join(SOLVERS))] = None
    """Who decides which weights stay and what they become. Unset: magnitude (the largest stay)."""

    split: str = "val"
    """val: the split that the run itself validated on; test: its last half, for final figures.
    Whatever was chosen by validation must not have seen the last half.
    """

    data: str | None = None
    """As in training: stdlib, a file of text, JSONL or parquet, or a folder of token shards.
    Unset: the run's.
    """

    text_field: str | None = None
    """As in training: the field of JSONL or parquet that holds the texts. Unset: the run's."""

    eval_batches: int | None = None
    """Batches to evaluate, each as large as the run's were over all its ranks.
    0 for the whole split. Unset: as many as the run validated with.
    """

    prunable: str | None = None
    """Shell-style patterns of the parameters to compress, with commas between. Unset: the run's."""

    out: Path | None = None
    """Folder for evaluation.json and evaluation.png, which are replaced. Unset: the table alone."""

    backend: str | None = None
    """As in training: nccl, a GPU for every rank of a node, or gloo. Unset: nccl on GPUs."""

    timeout_s: int = RunFlags.timeout_s
    """Seconds that a rank waits for the others in a collective."""

    @property
    def chosen(self) -> tuple[Compression, ...] | None:
        """The targets, None where the source decides. Raises ValueError for what cannot be."""
        if self.targets is None:
            return None
        if self.targets == "none":
            return ()
        return tuple(map(Compression.of, self.targets.split(",")))

    @property
    def chosen_method(self) -> str:
        """The method's name. Raises ValueError for one that cannot be, or has nothing to do."""
        idle = "with --targets none" if self.targets == "none" else None
        return chosen_method(self.method, idle=idle)
