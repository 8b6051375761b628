"""The flags that every training run has, whatever its wire and its method. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from qsdp.common.flags import Flags
from qsdp.models.registry import DEFAULT_PRESET, preset_defaults

_MODEL = f"Model preset: {', '.join(preset_defaults())}. The other flags' defaults depend on it."
PRECISIONS = ("fp32", "bf16")
BACKENDS = ("nccl", "gloo")


@dataclass(frozen=True, kw_only=True)
class RunFlags(Flags):
    """What is trained, how, for how long, and on how many ranks."""

    model: Annotated[str, tyro.conf.arg(help=_MODEL)] = DEFAULT_PRESET

    steps: int = 2000
    """Optimizer steps in all, those before a resume included."""

    batch_size: int = 6
    """Sequences a rank and micro-batch."""

    grad_accum: int = 1
    """Micro-batches whose gradients are added up before one optimizer step."""

    seq_len: int = 64
    """Tokens a sequence, at most the model's context."""

    lr: float = 1e-3
    """Learning rate after the warm-up."""

    min_lr: float | None = None
    """Learning rate at the end of the cosine, which begins after --warmup-steps.
    Unset: a tenth of --lr.
    """

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly; may exceed --steps."""

    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only: norms and biases have none."""

    beta2: float = 0.99
    """AdamW's second beta (the first is 0.9)."""

    clip_grad: float = 1.0
    """Largest global gradient norm, 0 for no clipping."""

    max_bad_steps: int = 10
    """After how many steps in a row without a finite loss and gradient the run ends, 1 or more.
    Each such step is skipped: it leaves weights and optimizer as they were.
    """

    seed: int = 0
    """Seed of the weights, the data order, the wire's rounding and what a method draws."""

    precision: str = "fp32"
    """fp32, or bf16 for bf16 weights and activations with fp32 master weights and gradient sums."""

    replicas: int = 1
    """Copies of the model (HSDP), which must divide the ranks.
    Each is sharded over ranks / copies consecutive ranks. Gradients are averaged over the
    copies, at their bits where the wire is quantized.
    """

    backend: str | None = None
    """What collectives run over: nccl or gloo. Unset: nccl on GPUs, gloo on CPUs.
    nccl wants a GPU for every rank of a node; ranks of gloo may share GPUs (slow: all goes
    through host memory).
    """

    timeout_s: int = 900
    """Seconds that a rank waits for the others in a collective before it ends.
    More than writing a checkpoint takes. A rank that has ended is noticed at once.
    """

    @property
    def last_lr(self) -> float:
        """The learning rate of the last step."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what no run can have."""
        for name in ("steps", "batch_size", "grad_accum", "seq_len", "replicas", "max_bad_steps"):
            self.require(name, getattr(self, name) >= 1, "choose 1 or more")
        self.require("warmup_steps", self.warmup_steps >= 0, "choose 0 or more")
        for name in ("weight_decay", "clip_grad"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "choose a number from 0")
        self.require("lr", 0 < self.lr < math.inf, "choose a number above 0")
        self.require("min_lr", 0 <= self.last_lr <= self.lr, f"choose 0 to --lr, {self.lr:g}")
        self.require("beta2", 0 <= self.beta2 < 1, "choose a number from 0 to below 1")
        self.require("seed", 0 <= self.seed < 1 << 63, "choose an integer from 0 to 2**63 - 1")
        self.require("backend", self.backend in (None, *BACKENDS), "choose nccl or gloo")
        self.require("precision", self.precision in PRECISIONS, "choose fp32 or bf16")
        self.require("timeout_s", 1 <= self.timeout_s <= 1 << 31, "choose 1 second or more")
        if self.min_lr is not None and self.warmup_steps >= self.steps - 1:
            raise ValueError(
                f"--min-lr is {self.min_lr:g}, but none of the {self.steps} steps follows the "
                f"warm-up of {self.warmup_steps}: shorten --warmup-steps, or leave it out."
            )
