"""Who takes part in a comparison by link.py: no communication, FSDP2, its rivals, and qsdp."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qsdp
from benchmarks.support.rivals import ddp, powersgd, zero3
from benchmarks.support.steps import MODELS, Ready, Setting, whole_model, with_adamw
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
BF16_FP32_REDUCE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FP32 = MixedPrecisionPolicy()

FLOOR, YARDSTICK, RIVAL, OURS = "floor", "yardstick", "rival", "ours"
"""What a contestant is for: a yardstick explains others' time, and stands in no comparison."""

SHORT = (
    "alone-fp32",
    "fsdp-fp32",
    "ddp-fp32",
    "ddp-powersgd-fp32",
    "qsdp-w4g4-once-fp32",
    "qsdp-w4g4-delta-fp32",
)
"""Who is in the short form, beside ZeRO-3 or, where it is not installed, qsdp with 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train, and how it is called."""

    name: str
    what: str
    make: Callable[[Setting], Ready]
    role: str = RIVAL
    shards: bool = False
    """Whether a rank holds only its part of weights and optimizer state."""


def contestants(powersgd_rank: int = 4) -> list[Contestant]:
    """All of them, in the order of the table."""
    rows = []
    for name, dtype, policy in (
        ("fp32", torch.float32, FP32),
        ("bf16", torch.bfloat16, BF16_FP32_REDUCE),
    ):
        rows += [
            Contestant(
                name=f"alone-{name}",
                what=f"no communication, {name}",
                make=alone(dtype),
                role=FLOOR,
            ),
            Contestant(
                name=f"fsdp-alone-{name}",
                what=f"FSDP2 over one rank, {name}",
                make=fsdp(policy, is_alone=True),
                role=YARDSTICK,
            ),
        ]
    for name, what, policy in (
        ("fsdp-fp32", "FSDP2 fp32", FP32),
        ("fsdp-bf16", "FSDP2 bf16", BF16),
        ("fsdp-bf16-fp32-reduce", "FSDP2 bf16, fp32 reduce", BF16_FP32_REDUCE),
    ):
        rows.append(Contestant(name=name, what=what, make=fsdp(policy), shards=True))
    low_rank = f"DDP PowerSGD rank {powersgd_rank}"
    rows += [
        Contestant(name="ddp-fp32", what="DDP fp32", make=ddp(is_bf16=False)),
        Contestant(name="ddp-bf16", what="DDP bf16, bf16 hook", make=ddp(is_bf16=True)),
        Contestant(
            name="ddp-powersgd-fp32", what=f"{low_rank}, fp32", make=powersgd(is_bf16=False)
        ),
        Contestant(name="ddp-powersgd-bf16", what=f"{low_rank}, bf16", make=powersgd(is_bf16=True)),
        Contestant(
            name="zero3-fp32", what="DeepSpeed ZeRO-3 fp32", make=zero3(is_bf16=False), shards=True
        ),
        Contestant(
            name="zero3-bf16", what="DeepSpeed ZeRO-3 bf16", make=zero3(is_bf16=True), shards=True
        ),
    ]
    rows += [
        of_qsdp(bits, gather, precision)
        for precision in ("fp32", "bf16")
        for bits in (32, 16, 8, 4)
        for gather in ("twice", "once", "delta")
        if bits <= 8 or gather != "delta"
        if (bits, precision) != (16, "bf16")  # at 32 bf16 values travel as they are
    ]
    for bits, gather in ((8, "twice"), (8, "once"), (4, "once")):
        config = qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits, gather=gather)
        rows.append(
            Contestant(
                name=f"waiting-fp32-w{bits}g{bits}-{gather}",
                what=f"qsdp W{bits}G{bits} {gather}, fp32, reduces waited for",
                make=fsdp(FP32, config, waits=True),
                role=YARDSTICK,
            )
        )
    return rows


def of_qsdp(bits: int, gather: str, precision: str) -> Contestant:
    """FSDP2 with qsdp's wire; of 32 bits in bf16, values are bf16 both ways."""
    is_bf16 = precision == "bf16"
    values = {32: f"{precision} values", 16: "bf16 values"}.get(bits, f"W{bits}G{bits}")
    config = qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits, gather=gather)
    policy = (BF16 if bits == 32 else BF16_FP32_REDUCE) if is_bf16 else FP32
    return Contestant(
        name=f"qsdp-w{bits}g{bits}-{gather}-{precision}",
        what=f"qsdp {values} gathered {gather}, {precision}",
        make=fsdp(policy, config),
        role=OURS,
        shards=True,
    )


def alone(dtype: torch.dtype) -> Callable[[Setting], Ready]:
    """The floor: every rank trains a whole model and hears of nobody."""

    def make(setting: Setting) -> Ready:
        return with_adamw(whole_model(setting).to(dtype), setting)

    return make


def fsdp(
    policy: MixedPrecisionPolicy,
    config: qsdp.QSDPConfig | None = None,
    *,
    is_alone: bool = False,
    waits: bool = False,
) -> Callable[[Setting], Ready]:
    """FSDP2 as launch/train_gpt.py uses it, with qsdp's wire where there is a config.

    Alone it has nobody to talk to, and what is left is its own work and the computation. Where
    gradients are read in the backward pass (``waits``), qsdp's reduces cannot travel beside it.
    """

    def make(setting: Setting) -> Ready:
        with torch.device("meta"):
            model = GPT(setting.size)
        mesh = setting.alone if is_alone else setting.mesh
        starts = [len(model.blocks) * i // setting.groups for i in range(setting.groups)]
        ends = [*starts[1:], len(model.blocks)]
        groups = [list(model.blocks[i:j]) for i, j in zip(starts, ends, strict=True)]
        for blocks in groups:
            fully_shard(blocks, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for module, following in pairwise([model, *(blocks[0] for blocks in groups)]):
            module.set_modules_to_forward_prefetch([following])
        model.to_empty(device=setting.device)
        init_weights(model, setting.seed)
        for parameter in model.parameters() if waits else ():
            parameter.register_post_accumulate_grad_hook(lambda _: None)
        handle = None
        if config is not None:
            handle = qsdp.install(model, replace(config, seed=setting.seed))
        return with_adamw(model, setting, handle)

    return make


def chosen(arguments: argparse.Namespace) -> list[Contestant]:
    """Those that the patterns of --contestants and --without leave; maybe none."""
    patterns = arguments.contestants or (["*"] if arguments.device == "cuda" else ["*-fp32"])

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [
        one
        for one in contestants(arguments.powersgd_rank)
        if matches(one.name, patterns) and not matches(one.name, arguments.without)
    ]


def trained(arguments: argparse.Namespace) -> list[Contestant]:
    """Those of ``chosen`` whose loss says something."""
    return [one for one in chosen(arguments) if one.role != YARDSTICK]


def add_size_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the model that a comparison's driver lets its ranks time, and a step's tokens."""
    parser.add_argument("--model", choices=MODELS, default="19m", help="its number of parameters")
    parser.add_argument(
        "--groups", type=int, default=0, help="FSDP2 groups of blocks; 0: each block is its own"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="a rank and step")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--vocab-size", type=int, default=256, help="different tokens")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add what else a comparison's driver hands through to its ranks."""
    add_turn_arguments(parser)
    parser.add_argument(
        "--contestants",
        nargs="+",
        help="shell-style patterns of names; by default *-fp32, on GPUs all",
    )
    parser.add_argument("--without", nargs="+", default=[], help="patterns of names to leave out")
    parser.add_argument("--powersgd-rank", type=int, default=4, help="of its matrices")


def add_turn_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the part of that which is not about who takes part."""
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds before")
    parser.add_argument(
        "--settle",
        type=int,
        default=1,
        help="untimed steps before every timed one: a machine may have taken away memory that was "
        "not used during the others' turns",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, a rank")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="a GPU a rank where there are enough, else CPUs"
    )
