"""What a user would run instead: one process of a comparison on the same link, under link.py.

Builds every contestant's own copy of one GPT and lets them take turns: each round one training step
of each, on the same tokens. Rank 0 writes rows of JSON: seconds a step (the slowest rank's), bytes
that left the hosts' interfaces, and for qsdp where the time of its collectives went.

    sudo python benchmarks/link.py --hosts 2 --rate 100mbit -- contestants.py --out rows.json
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import qsdp
from qsdp.files import write_json
from qsdp.models import GPT, GPTConfig, init_weights
from qsdp.train.world import end_process, keep_freed_memory

LR = 1e-3
MODELS = {
    "1m": (4, 128),
    "5m": (6, 256),
    "19m": (6, 512),
    "50m": (7, 768),
    "116m": (12, 896),
    "302m": (24, 1024),
}
"""Layers and width by name, which is about the number of parameters."""

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
BF16_FP32_REDUCE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FP32 = MixedPrecisionPolicy()


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train, and how it is called."""

    name: str
    what: str
    make: Callable[[Setting], Step]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contestants share."""

    size: GPTConfig
    tokens: Tensor
    """int64 [batch, context]: inputs and, for want of better, targets."""
    mesh: DeviceMesh
    alone: DeviceMesh
    """Of this rank only."""
    groups: int
    """FSDP2 groups of blocks, beside the root's."""


@dataclass
class Step:
    """A model ready to train."""

    run: Callable[[], None]
    handle: qsdp.Handle | None = None
    seconds: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)


def contestants() -> list[Contestant]:
    """All of them, in the order of the table."""
    rows = [
        Contestant(name="alone-fp32", what="no communication, fp32", make=alone(torch.float32)),
        Contestant(name="alone-bf16", what="no communication, bf16", make=alone(torch.bfloat16)),
        Contestant(
            name="fsdp-alone-fp32", what="FSDP2 over one rank, fp32", make=fsdp(FP32, is_alone=True)
        ),
        Contestant(
            name="fsdp-alone-bf16",
            what="FSDP2 over one rank, bf16",
            make=fsdp(BF16_FP32_REDUCE, is_alone=True),
        ),
        Contestant(name="fsdp-fp32", what="FSDP2 fp32", make=fsdp(FP32)),
        Contestant(name="fsdp-bf16", what="FSDP2 bf16", make=fsdp(BF16)),
        Contestant(
            name="fsdp-bf16-fp32-reduce",
            what="FSDP2 bf16, fp32 reduce",
            make=fsdp(BF16_FP32_REDUCE),
        ),
        Contestant(name="ddp-fp32", what="DDP fp32", make=ddp(is_bf16=False)),
        Contestant(name="ddp-bf16", what="DDP bf16, bf16 hook", make=ddp(is_bf16=True)),
        Contestant(name="zero3-fp32", what="DeepSpeed ZeRO-3 fp32", make=zero3(is_bf16=False)),
        Contestant(name="zero3-bf16", what="DeepSpeed ZeRO-3 bf16", make=zero3(is_bf16=True)),
        Contestant(
            name="qsdp-32",
            what="qsdp fp32 values, fp32",
            make=fsdp(FP32, qsdp.QSDPConfig(weight_bits=32, grad_bits=32)),
        ),
        Contestant(
            name="qsdp-16",
            what="qsdp bf16 values, bf16",
            make=fsdp(BF16, qsdp.QSDPConfig(weight_bits=32, grad_bits=32)),
        ),
    ]
    for bits in (8, 4):
        for gather in ("twice", "once"):
            for precision, policy in (("fp32", FP32), ("bf16", BF16_FP32_REDUCE)):
                config = qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits, gather=gather)
                rows.append(
                    Contestant(
                        name=f"qsdp-w{bits}g{bits}-{gather}-{precision}",
                        what=f"qsdp W{bits}G{bits} gathered {gather}, {precision}",
                        make=fsdp(policy, config),
                    )
                )
    config = qsdp.QSDPConfig(weight_bits=4, grad_bits=4, gather="once")
    rows.append(
        Contestant(
            name="waiting-w4g4-once-bf16",
            what="the same, reduces waited for",
            make=fsdp(BF16_FP32_REDUCE, config, waits=True),
        )
    )
    return rows


def alone(dtype: torch.dtype) -> Callable[[Setting], Step]:
    """The floor: every rank trains a whole model and hears of nobody."""

    def make(setting: Setting) -> Step:
        model = GPT(setting.size)
        init_weights(model, seed=0)
        return Step(trainer(model.to(dtype), setting))

    return make


def fsdp(
    policy: MixedPrecisionPolicy,
    config: qsdp.QSDPConfig | None = None,
    *,
    is_alone: bool = False,
    waits: bool = False,
) -> Callable[[Setting], Step]:
    """FSDP2 as launch/train_gpt.py uses it, with qsdp's wire where there is a config; alone it has
    nobody to talk to, and what is left is its own work and the computation. Where gradients are
    read in the backward pass (``waits``), qsdp's reduces cannot travel beside it."""

    def make(setting: Setting) -> Step:
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
        model.to_empty(device="cpu")
        init_weights(model, seed=0)
        for parameter in model.parameters() if waits else ():
            parameter.register_post_accumulate_grad_hook(lambda _: None)
        handle = None if config is None else qsdp.install(model, config)
        return Step(trainer(model, setting), handle)

    return make


def ddp(*, is_bf16: bool) -> Callable[[Setting], Step]:
    """DDP with fp32 weights; in bf16 by autocast, its gradients through the bf16 hook."""

    def make(setting: Setting) -> Step:
        model = GPT(setting.size)
        init_weights(model, seed=0)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if is_bf16:
            wrapped.register_comm_hook(None, averaged_in_bf16)
        return Step(trainer(wrapped, setting, autocast=is_bf16))

    return make


def averaged_in_bf16(_, bucket):  # DDP refuses annotations that are texts
    """What torch's bf16_compress_hook does, which it refuses to do over gloo."""
    halves = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(halves, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def zero3(*, is_bf16: bool) -> Callable[[Setting], Step]:
    """DeepSpeed ZeRO stage 3 as its documentation sets it up, with torch's AdamW."""

    def make(setting: Setting) -> Step:
        import deepspeed

        model = GPT(setting.size)
        init_weights(model, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        config = {
            "train_micro_batch_size_per_gpu": setting.tokens.shape[0],
            "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": is_bf16},
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )

        def run() -> None:
            _, loss = engine(setting.tokens, setting.tokens)
            engine.backward(loss)
            engine.step()

        return Step(run)

    return make


def trainer(model: nn.Module, setting: Setting, *, autocast: bool = False) -> Callable[[], None]:
    """One AdamW step of a model whose forward gives (None, loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, loss = model(setting.tokens, setting.tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore", FutureWarning)  # of FSDP2's and DeepSpeed's own calls
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as qsdp's trainer does; all contestants have it
    started = time.perf_counter()
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    size, rank = dist.get_world_size(), dist.get_rank()
    layers, width = MODELS[arguments.model]
    config = GPTConfig(
        vocab_size=256,
        num_layers=layers,
        num_heads=width // 64,
        width=width,
        context=arguments.context,
    )
    shape = (max(1, arguments.tokens // arguments.context), arguments.context)
    generator = torch.Generator().manual_seed(rank)
    setting = Setting(
        size=config,
        tokens=torch.randint(config.vocab_size, shape, generator=generator),
        mesh=init_device_mesh("cpu", (size,)),
        alone=init_device_mesh("cpu", (size, 1), mesh_dim_names=("rank", "self"))["self"],
        groups=min(arguments.groups or layers, layers),
    )
    chosen = [c for c in contestants() if is_chosen(c.name, arguments)]
    bare_rss_bytes = peak_rss_bytes()
    steps = {contestant.name: contestant.make(setting) for contestant in chosen}
    gc.collect()
    gc.freeze()
    say(f"{len(steps)} contestants ready in {time.perf_counter() - started:.0f} s")
    for turn in range(arguments.warmup + arguments.rounds):
        begun = time.perf_counter()
        for step in steps.values():
            for _ in range(arguments.settle):
                step.run()
            measure(step, is_kept=turn >= arguments.warmup)
        what = "warm-up" if turn < arguments.warmup else "round"
        count = turn + 1 if turn < arguments.warmup else turn + 1 - arguments.warmup
        taken = time.perf_counter() - begun
        left = taken * (arguments.warmup + arguments.rounds - turn - 1)
        say(f"{what} {count}: {taken:.1f} s, about {timedelta(seconds=round(left))} left")
    if rank == 0:
        rows = [
            {
                "name": contestant.name,
                "what": contestant.what,
                "seconds": step.seconds,
                "sent_bytes": step.sent_bytes,
                "parts": step.parts,
            }
            for contestant, step in zip(chosen, steps.values(), strict=True)
        ]
        record = {
            "parameters": parameters(config),
            "tokens": shape[0] * shape[1],
            "ranks": size,
            "groups": setting.groups,
            "threads": arguments.threads,
            "bare_rss_bytes": bare_rss_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "rows": rows,
        }
        write_json(arguments.out, record)
    dist.barrier()
    end_process(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="a file for the rows")
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the driver hands through."""
    parser.add_argument("--model", choices=MODELS, default="19m", help="its number of parameters")
    parser.add_argument(
        "--groups", type=int, default=0, help="FSDP2 groups of blocks; 0: each block is its own"
    )
    parser.add_argument("--tokens", type=int, default=768, help="a rank and step")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant")
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
        "--contestants", nargs="+", default=["*"], help="shell-style patterns of names"
    )
    parser.add_argument("--without", nargs="+", default=[], help="patterns of names to leave out")


def is_chosen(name: str, arguments: argparse.Namespace) -> bool:
    """Whether a contestant runs."""
    chosen, left_out = (
        any(fnmatchcase(name, pattern) for pattern in patterns)
        for patterns in (arguments.contestants, arguments.without)
    )
    return chosen and not left_out


def parameters(size: GPTConfig) -> int:
    """Values of a model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(size).parameters())


def measure(step: Step, *, is_kept: bool) -> None:
    """Take one step of a contestant and write down what it took."""
    before = {} if step.handle is None else step.handle.times.snapshot()
    dist.barrier()
    sent = sent_bytes()
    started = time.perf_counter()
    step.run()
    seconds = time.perf_counter() - started
    dist.barrier()
    found = torch.tensor([seconds, float(sent_bytes() - sent)], dtype=torch.float64)
    slowest = found.clone()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if not is_kept:
        return
    step.seconds.append(float(slowest[0]))
    step.sent_bytes.append(int(slowest[1]))
    if step.handle is not None:
        after = step.handle.times.snapshot()
        step.parts.append({name: after[name] - before[name] for name in after})


def sent_bytes() -> int:
    """What has left this host's interface; 0 where gloo was not given one."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if not interface:
        return 0
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(text: str) -> None:
    """Print progress on rank 0."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
