"""One rank of link.py's comparison: every contestant's own copy of one GPT, and their turns.

In a round each takes one step on the same tokens, one contestant at a time on all ranks. Rank 0
adds every finished round to a file, and a call for the same file goes on after its last one.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.support.contestants import add_arguments, add_size_arguments, chosen
from benchmarks.support.ranks import Ranks
from benchmarks.support.rounds import due, read
from benchmarks.support.steps import Ready, parameters
from qsdp.commands.exit import end_process
from qsdp.common.json_files import write_json


def main() -> None:
    arguments = parse()
    ranks = Ranks.meet(arguments)
    take_turns(arguments, ranks)
    ranks.barrier()
    end_process(0)


def take_turns(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Add the rounds that the file lacks."""
    started = time.perf_counter()
    setting = ranks.setting(arguments, arguments.model, arguments.vocab_size)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (setting.batch, arguments.context)
    tokens_BT = torch.randint(arguments.vocab_size, shape, generator=generator).to(ranks.device)
    record: dict[str, Any] = ranks.decided(lambda: read(arguments.out))
    names = [one.name for one in chosen(arguments)]
    todo = due(record["rounds"], names, arguments.rounds)
    bare_bytes = peak_bytes(ranks.device)
    ready = {one.name: one.make(setting) for one in chosen(arguments) if one.name in todo}
    gc.collect()
    gc.freeze()
    ranks.say(f"{len(ready)} contestants ready in {time.perf_counter() - started:.0f} s")
    for one in ready.values():
        for _ in range(one.lead_in):
            one.step(tokens_BT, tokens_BT)
    for turn in range(arguments.warmup):
        began = time.perf_counter()
        take_round(ready, tokens_BT, ranks, arguments.settle)
        ranks.say(f"warm-up {turn + 1}: {time.perf_counter() - began:.1f} s")
    while todo:
        began = time.perf_counter()
        taken = take_round({name: ready[name] for name in todo}, tokens_BT, ranks, arguments.settle)
        record["rounds"].append(taken)
        record["facts"] = {
            "parameters": parameters(setting.size),
            "tokens": tokens_BT.numel(),
            "ranks": ranks.size,
            "groups": setting.groups,
            "bare_bytes": bare_bytes,
            "peak_bytes": peak_bytes(ranks.device),
        }
        if ranks.rank == 0:
            write_json(arguments.out, record)
        # By rank 0's record, which is every rank's but for the parts of its steps.
        todo = ranks.decided(lambda: due(record["rounds"], names, arguments.rounds))
        seconds, count = time.perf_counter() - began, len(record["rounds"])
        left = timedelta(seconds=round(seconds * (arguments.rounds - count) if todo else 0))
        ranks.say(f"round {count}: {seconds:.1f} s, at most about {left} left")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_size_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file of rounds")
    return parser.parse_args()


def take_round(
    ready: dict[str, Ready], tokens_BT: Tensor, ranks: Ranks, settle: int
) -> dict[str, Any]:
    """Take one step of each, and say what it took."""
    taken = {}
    for name, one in ready.items():
        for _ in range(settle):
            one.step(tokens_BT, tokens_BT)
        taken[name] = measure(one, tokens_BT, ranks)
    return taken


def measure(one: Ready, tokens_BT: Tensor, ranks: Ranks) -> dict[str, Any]:
    """Take one step of a contestant, with all ranks, and say what it took."""
    before = {} if one.handle is None else one.handle.times.snapshot()
    ranks.barrier()
    sent = sent_bytes()
    started = time.perf_counter()
    one.step(tokens_BT, tokens_BT)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    ranks.barrier()
    most = torch.tensor([seconds, float(sent_bytes() - sent)], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=ranks.control)
    after = {} if one.handle is None else one.handle.times.snapshot()
    return {
        "seconds": float(most[0]),
        "sent_bytes": int(most[1]),
        "parts": {name: after[name] - before[name] for name in after},
    }


def sent_bytes() -> int:
    """What has left this host's interface; 0 where gloo was not given one."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if not interface:
        return 0
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: a GPU's memory, or its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
