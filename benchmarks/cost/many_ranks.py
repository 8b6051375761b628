"""What one gather and one reduce of a group cost a host with many ranks: Python, tables and calls.

    python -m benchmarks.cost.many_ranks --json many_ranks.json

The group is a GPT block, 8 bits both ways, and so narrow that its kernels have little to do. One
process is rank 1 of N, and nobody else is there: in place of the wire stands a function that fills
in what the others would have sent, this rank's own payload under their headers. Its time is left
out, and that of the codec's kernels is shown apart. With masks half of the weights are pruned, so
that every rank's payload has a layout of its own. A layout is made anew where the masks change, and
otherwise used again.

Figures are medians over rounds, the cases being taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from benchmarks.support import machine
from benchmarks.support.asked import check_each_least, check_least
from benchmarks.support.runs import ends_on_error
from qsdp import ops
from qsdp.codec.payload import HEADER_BYTES, VERSION
from qsdp.comm import transport
from qsdp.comm.all_gather import WeightGather
from qsdp.comm.group_plan import Parameter, Plan
from qsdp.comm.pruned_slices import Masks
from qsdp.comm.reduce_scatter import exchanges_of, reduce
from qsdp.comm.traffic import Traffic
from qsdp.comm.weight_cache import WeightCache
from qsdp.comm.wire_state import Wire
from qsdp.common import bitmask
from qsdp.common.atomic_files import write_json
from qsdp.config import QSDPConfig

RANK = 1
CODEC = ("encode", "decode", "encode_all", "decode_all", "compact", "expand")


def main() -> None:
    arguments = parse()
    with ends_on_error():
        check_least(arguments, {"rounds": 1, "width": 1})
        check_each_least("--ranks", arguments.ranks, 2)
        torch.set_num_threads(1)  # kernels have little to share out
        rows = measure(arguments.ranks, arguments.width, arguments.rounds)
    for row in rows:
        print(line(row))
    described = machine.describe()
    print(machine.one_line(described))
    if arguments.json is not None:
        write_json(arguments.json, {"machine": described, "width": arguments.width, "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--width", type=int, default=128, help="of the block")
    parser.add_argument("--rounds", type=int, default=15, help="of all cases")
    parser.add_argument("--json", type=Path, help="a file for the table")
    return parser.parse_args()


def measure(ranks: list[int], width: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of the table, a case each."""
    cases = {
        (num, has_masks): Group(num, width, has_masks)
        for num in ranks
        for has_masks in (False, True)
    }
    taken: dict[tuple[int, bool, str], list[tuple[float, float]]] = {}
    for place in track(range(rounds + 1), "rounds"):
        for (num, has_masks), group in cases.items():
            for is_new in (True, False):
                if is_new:
                    group.forget_layouts()
                for what, work in (("gather", group.gather), ("reduce", group.reduce)):
                    name = f"{what}, its layout made" if is_new else what
                    seconds = group.timed(work)
                    if place:  # the first warms up
                        taken.setdefault((num, has_masks, name), []).append(seconds)
    return [
        {
            "ranks": num,
            "masks": has_masks,
            "what": what,
            "host_s": [whole - kernels for whole, kernels in found],
            "kernels_s": [kernels for _, kernels in found],
        }
        for (num, has_masks, what), found in taken.items()
    ]


def line(row: dict[str, Any]) -> str:
    """A row of the table for a reader."""
    host, kernels = (1e3 * statistics.median(row[key]) for key in ("host_s", "kernels_s"))
    most, least = 1e3 * max(row["host_s"]), 1e3 * min(row["host_s"])
    masks = "masks" if row["masks"] else "whole"
    return (
        f"{row['ranks']:5} ranks  {masks}  {row['what']:24}{host:9.3f} ms on the host "
        f"({least:.3f} to {most:.3f}), kernels {kernels:.3f} ms"
    )


class Group:
    """A block's group as rank `RANK` of ``num_ranks`` sees it.

    Args:
        num_ranks: of the shard group.
        width: of the block.
        has_masks: whether half of each matrix is pruned.
    """

    def __init__(self, num_ranks: int, width: int, has_masks: bool) -> None:
        self.num_ranks = num_ranks
        config = QSDPConfig(weight_bits=8, grad_bits=8)
        self.wire = Wire(config, Traffic(cast(Any, _Nodes())))
        group = cast(Any, _Ranks(num_ranks))
        self.plan = plan = Plan(parameters_of(width), 0, group, config)
        if has_masks:
            plan.set_support(masks_of(plan))
        self.cache = WeightCache(plan, self.wire)
        self.weights = torch.zeros(num_ranks, plan.buffer_bytes, dtype=torch.uint8)
        self.grads = torch.zeros(num_ranks, plan.buffer_bytes // 4)
        self._away = 0.0

    def forget_layouts(self) -> None:
        """Let each layout be made anew."""
        self.plan._layouts.clear()

    def gather(self) -> None:
        weights = self.cache.find([True] * len(self.plan.places))
        own = self.weights[RANK]
        WeightGather(
            self.plan, self.cache, self.wire, *weights, own, self.weights.view(-1), keeps=False
        ).finish()

    def reduce(self) -> None:
        plan, wire = self.plan, self.wire
        exchanges = exchanges_of(plan, plan.places, torch.float32, plan.group, wire)
        output = torch.empty_like(self.grads[0])
        step = reduce(plan, exchanges, output, self.grads.view(-1), wire, 0, is_late=False)
        for _ in step:
            pass

    def timed(self, work: Callable[[], None]) -> tuple[float, float]:
        """Seconds of ``work`` without the stand-in for the wire, and those of kernels in it."""
        self._away, kernels = 0.0, [0.0]
        with self._alone(), _watched(kernels):
            started = time.perf_counter()
            work()
            return time.perf_counter() - started - self._away, kernels[0]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The wire is a function that fills in what others would have sent."""

        def all_gather(output: Tensor, input: Tensor, *_: Any, **options: Any) -> Any:
            return self._arrived(output, input, [*range(self.num_ranks)])

        def all_to_all(output: Tensor, input: Tensor, *_: Any) -> Any:
            peers = [rank for rank in range(self.num_ranks) if rank != RANK]
            return self._arrived(output, input[: output.numel() // len(peers)], peers)

        with (
            mock.patch.object(transport, "all_gather", all_gather),
            mock.patch.object(transport, "all_to_all", all_to_all),
            mock.patch.object(
                dist, "get_process_group_ranks", lambda group: [*range(group.size())]
            ),
        ):
            yield

    def _arrived(self, output: Tensor, own: Tensor, senders: list[int]) -> Any:
        started = time.perf_counter()
        rows = output.view(len(senders), -1)
        rows.copy_(own.clone())
        rows[:, :HEADER_BYTES].view(torch.int64)[:, 0] = torch.tensor(senders) | VERSION << 32
        self._away += time.perf_counter() - started
        return cast(Any, _Arrived(output))


class _Ranks:
    """What a plan asks of a process group."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def size(self) -> int:
        return self._num_ranks

    def rank(self) -> int:
        return RANK


class _Nodes:
    """What counters ask of nodes: all others are elsewhere."""

    def is_here(self, rank: int) -> bool:
        return rank == RANK


class _Arrived:
    def __init__(self, output: Tensor) -> None:
        self._output = output

    def wait(self) -> Tensor:
        return self._output


def parameters_of(width: int) -> list[Parameter]:
    """Those of a GPT block."""
    shapes: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "qkv.weight": (3 * width, width),
        "qkv.bias": (3 * width,),
        "proj.weight": (width, width),
        "proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "up.weight": (4 * width, width),
        "up.bias": (4 * width,),
        "down.weight": (width, 4 * width),
        "down.bias": (width,),
    }
    return [
        Parameter(
            name=name,
            index=i,
            shape=torch.Size(shape),
            dtype=torch.float32,
            shard_dim=0,
            weight_bits=8 if len(shape) == 2 else 32,
            grad_bits=8 if len(shape) == 2 else 32,
            keeps_bits=False,
            why="",
        )
        for i, (name, shape) in enumerate(shapes.items())
    ]


def masks_of(plan: Plan) -> dict[int, Masks]:
    """By place those that keep a random half of each matrix."""
    torch.manual_seed(0)
    starts, bits, counts, end = [], [], [], 0
    places = [i for i, p in enumerate(plan.parameters) if len(p.shape) == 2]
    for i in places:
        parameter = plan.parameters[i]
        padded = parameter.padded_numel(plan.world_size)
        keep = torch.rand(plan.world_size, padded) < 0.5
        for rank in range(plan.world_size):
            keep[rank, parameter.shard_numel(rank, plan.world_size) :] = False
        bits.append(torch.stack([bitmask.pack(row) for row in keep]))
        counts.append(keep.sum(1).tolist())
        starts.append(end)
        end += bits[-1].shape[1]
    everyone = torch.cat(bits, dim=1)
    return {
        i: Masks(everyone, start, count)
        for i, start, count in zip(places, starts, counts, strict=True)
    }


@contextmanager
def _watched(seconds: list[float]) -> Iterator[None]:
    """Add the time of the codec's kernels to ``seconds``."""

    def watch(kernel: Any) -> Callable[..., None]:
        def timed(*given: Any, **options: Any) -> None:
            started = time.perf_counter()
            kernel(*given, **options)
            seconds[0] += time.perf_counter() - started

        return timed

    patches = [
        mock.patch.object(ops, name, watch(getattr(ops, name)))
        for name in CODEC
        if hasattr(ops, name)
    ]
    try:
        for patch in patches:
            patch.start()
        yield
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    main()
