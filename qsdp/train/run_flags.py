"""The flags that every training run has, whatever its wire and its method. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from qsdp.models.registry import DEFAULT_PRESET, presets

_MODEL = f"Model preset: {', '.join(presets())}. The other flags' defaults depend on it."


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What is trained, on what, for how long, and where the results go."""

    model: Annotated[str, tyro.conf.arg(help=_MODEL)] = DEFAULT_PRESET

    data: str = "stdlib"
    """What to train on: `stdlib` (the sources of the Python standard library), a text file, or a
    folder of token shards (train-*.bin, val-*.bin, meta.json)."""

    tokenizer: str | None = None
    """`char`, `byte`, or a JSON file of the `tokenizers` library. Unset: byte for stdlib, char for
    a text file, and the folder's own for token shards."""

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
    """Learning rate at the end of the cosine, which begins after --warmup-steps. Unset: a tenth of
    --lr."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly; may exceed --steps."""

    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only: norms and biases have none."""

    beta2: float = 0.99
    """AdamW's second beta (the first is 0.9)."""

    clip_grad: float = 1.0
    """Largest global gradient norm, 0 for no clipping. CrAM+ adds two gradients, so it is clipped
    at twice this."""

    max_bad_steps: int = 10
    """After how many steps in a row without a finite loss and gradient the run ends, 1 or more.
    Each such step is skipped: it leaves weights and optimizer as they were."""

    seed: int = 0
    """Seed of the weights, the data order, the wire's rounding and CrAM's draws."""

    precision: str = "fp32"
    """`fp32`, or `bf16` for bf16 weights and activations with fp32 master weights and gradient
    sums."""

    replicas: int = 1
    """Copies of the model (HSDP), which must divide the ranks: each is sharded over ranks / copies
    consecutive ranks. Gradients are averaged over the copies, at their bits where the wire is
    quantized."""

    out: str | None = None
    """Folder for all results, seen by every node. Unset: out/MODEL-DATA-..., another one for every
    setting that changes a run's numbers."""

    eval_every: int = 250
    """Steps between validations, 0 for one at the end only."""

    eval_batches: int = 50
    """Validation batches of --batch-size a rank, fewer where the validation split ends."""

    save_every: int = 500
    """Steps between checkpoints, 0 for one at the end only."""

    save_async: bool = False
    """Write checkpoints while training goes on, but for the first one of each start: a save takes
    as long as a copy of this rank's part of the weights and of the optimizer's state, which stays
    in host memory until it is on disk. The next save, and the end, wait for it."""

    keep: int = 2
    """How many of the newest checkpoints stay on disk."""

    resume: str = "auto"
    """`auto` goes on from the newest checkpoint in --out, if any, which must be of the same run:
    every setting that changes its numbers, its data and the number of ranks. One that is damaged is
    passed over, aloud. A path, of a checkpoint or a folder of them, goes on from there with other
    settings, if they are of the same model and method; the same command again then goes on from the
    newest one that came of it. So does the folder of --out itself, which may be empty still: for a
    job that may be started again on another number of ranks.
    `none` begins anew. What --out holds of later steps goes when the first new checkpoint is on
    disk."""

    take_over: bool = False
    """Take --out from a run that holds it and is alive, or on a machine of which nothing is known:
    that run ends when it saves next."""

    backend: str | None = None
    """What collectives run over: `nccl`, a GPU for every rank of a node, or `gloo`, whose ranks may
    share GPUs (slow: all goes through host memory). Unset: nccl on GPUs, gloo on CPUs."""

    timeout_s: int = 900
    """Seconds that a rank waits for the others in a collective before it ends: more than writing a
    checkpoint takes. A rank that has ended is noticed at once."""
