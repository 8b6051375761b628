"""What a gather and a reduce of one group cost the host, against the number of ranks.

    python -m benchmarks.cost.many_ranks --json many_ranks.json

All ranks are simulated in this process: the group is one GPT block, at 8 bits both ways, over the
flat topology, and what the other ranks would have sent is encoded beforehand. A stand-in for the
transport copies it to where it arrives, whose own time is taken off. The block is small, so that at
1,000 ranks a slice is tiny: what grows with the ranks is seen, and not the kernels. Where half of
the weights are pruned, every rank's slice has sizes of its own.

Times are processor time of the one thread, without garbage collection: waiting for a core does not
count. A first use makes the layout and tables for all ranks, any other finds them. Each round takes
every case in turn, four times: first; again; again with qsdp's operators replaced by nothing, which
leaves Python and what it asks of torch; and the same calls of the operators with empty tables,
which is what calling takes. What these two leave of the second is kernels, with the check of each
call's table. Printed are medians over rounds. What comes out is compared, before it is timed, with
single calls of the operators.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.cost.simulated_ranks import Gather, Network, Reduce
from benchmarks.support import machine
from benchmarks.support.asked import check_each_least, check_least
from benchmarks.support.runs import ends_on_error
from qsdp import ops
from qsdp.common.json_files import write_json

CALLS_OF_RANKS = 512
"""Ranks whose payloads a timing works through at least: short uses are timed many at once."""


class Case:
    """A collective that is measured.

    Raises RuntimeError where it gives something else than single calls of the operators.
    """

    def __init__(self, kind: type[Gather | Reduce], num_ranks: int, width: int, is_pruned: bool):
        self.facts = {"collective": kind.__name__.lower(), "ranks": num_ranks}
        self.facts["is_pruned"] = is_pruned
        self._network = Network()
        with self._network.in_place():
            self._it = kind(num_ranks, width, self._network, is_pruned=is_pruned)
            self._it.once()
            if not torch.equal(self._it.output, self._it.expected):
                raise RuntimeError(
                    f"a {self.facts['collective']} over {num_ranks} ranks gives other values than "
                    "single calls of the operators, so that what it takes is of no interest."
                )
            self._calls = self._empty_calls()
        self._times = max(1, CALLS_OF_RANKS // num_ranks)
        self.taken: dict[str, list[float]] = {}
        """Seconds of each kind, by round."""

    def round(self) -> None:
        """Take every time once."""
        with self._network.in_place():
            self._it.forget()
            first = self._seconds(self._it.once, 1)
            again = self._seconds(self._it.once, self._times)
            with operators(lambda _: _nothing):
                python = self._seconds(self._it.once, self._times)
            calls = self._seconds(self._call_all, self._times)
        taken = {"first": first, "again": again, "python": python, "calls": calls}
        taken["kernels"] = again - python - calls
        for name, seconds in taken.items():
            self.taken.setdefault(name, []).append(seconds)

    def _seconds(self, call: Callable[[], None], times: int) -> float:
        """Seconds of one of ``times`` calls, without the network's."""
        self._network.seconds = 0.0
        had_gc = gc.isenabled()
        gc.disable()  # it would go through what all cases hold, in whichever is timed by then
        try:
            started = time.thread_time()
            for _ in range(times):
                call()
            return (time.thread_time() - started - self._network.seconds) / times
        finally:
            if had_gc:
                gc.enable()

    def _empty_calls(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """The operators that one use calls, each with an empty table: it stands second in all."""
        calls = []

        def note(operator: Any) -> Callable[..., None]:
            def call(given: Tensor, table: Tensor, *others: Any, **named: Any) -> None:
                calls.append((operator, (given, table[..., :0, :], *others), named))

            return call

        with operators(note):
            self._it.once()
        return calls

    def _call_all(self) -> None:
        for operator, given, named in self._calls:
            operator(*given, **named)


@contextmanager
def operators(replaced: Callable[[Any], Callable[..., None]]) -> Iterator[None]:
    """Inside, the place of each operator is taken by what ``replaced`` makes of it."""
    with ExitStack() as stack:
        for name in ops.schema.KERNELS:
            other = replaced(getattr(ops, name))
            stack.enter_context(mock.patch.object(ops, name, other))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    pass


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table."""
    torch.manual_seed(0)
    chosen = [
        (kind, num_ranks, arguments.width, is_pruned)
        for kind in (Gather, Reduce)
        for is_pruned in (False, True)
        for num_ranks in arguments.ranks
    ]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("many ranks", total=len(chosen) * (1 + arguments.rounds))
        cases = []
        for each in chosen:
            cases.append(Case(*each))
            progress.advance(task)
        for _ in range(arguments.rounds):
            for case in cases:
                case.round()
                progress.advance(task)
    return [case.facts | {"seconds": case.taken} for case in cases]


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    """Rows for a reader."""
    made = Table(
        title=f"Host time of a GPT block of width {arguments.width}, in ms (medians of "
        f"{arguments.rounds} rounds)"
    )
    made.add_column("collective")
    made.add_column("weights")
    for name in ("ranks", "first use", "again", "spread", "Python", "calls", "kernels"):
        made.add_column(name, justify="right")
    made.add_column("kernels' share", justify="right")
    for row in rows:
        again = row["seconds"]["again"]
        middle = {name: statistics.median(taken) for name, taken in row["seconds"].items()}
        shown = [f"{1e3 * middle[name]:.3f}" for name in ("first", "again")]
        shown.append(f"{1e3 * min(again):.3f}-{1e3 * max(again):.3f}")
        shown += [f"{1e3 * middle[name]:.3f}" for name in ("python", "calls", "kernels")]
        weights = "half pruned" if row["is_pruned"] else "whole"
        share = f"{middle['kernels'] / middle['again']:.0%}"
        made.add_row(row["collective"], weights, f"{row['ranks']:,}", *shown, share)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1000])
    # At 1,000 ranks each has one row of the widest weight: no slice is empty.
    parser.add_argument("--width", type=int, default=250, help="of the block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="a file for the table")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    with ends_on_error():
        check_least(arguments, {"rounds": 1, "width": 1})
        check_each_least("--ranks", arguments.ranks, 2)
        rows = measure(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log is no reason to break lines
    console.print(table(rows, arguments))
    described = machine.describe()
    print(machine.one_line(described))
    if arguments.json is not None:
        settings = {"width": arguments.width, "rounds": arguments.rounds}
        write_json(arguments.json, {"machine": described, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
