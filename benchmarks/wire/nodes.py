"""What leaves a node: two-hop collectives against flat ones, and gathers once against twice.

    sudo python -m benchmarks.wire.nodes --json nodes.json

Two nodes of two ranks each (network namespaces of this machine). Bytes are those that left a node's
interface in one step, less packet headers, the mean over the nodes, beside what qsdp's counters
say of them.

Reduces and gathers are told apart by the program passes.py: forward and backward with the weights
kept in between, less a forward alone, leaves the reduces; a training step's passes less the reduces
leave its gathers. Whole steps are those of launch/train_gpt.py: a long run less a short one,
divided by the difference of their steps, as in wire.py.

A flat all-gather is a ring in gloo: one rank of a node sends to the next node what all ranks there
and beyond still lack, three payloads here. In two hops each of the two ranks sends one. All reduces
send to each peer what is meant for it: four payloads leave a node flat, two in two hops. Hence 0.5
for the reduces, and 0.6 for a step of two gathers and a reduce.

Gathers once and twice: FSDP2 keeps the root's group (embeddings, last norm) from the forward to the
backward pass, so that is gathered once in both. In passes.py it holds half a percent of the values,
and the ratio can fall to 0.50.

Exits with status 1 if counters and interface differ by more than 3 %, or if a ratio misses its
target, and with status 2 where network namespaces cannot be made (Linux, root and iproute2 are
needed).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.support import machine
from benchmarks.support.namespaces import Hosts, Unavailable, exit_on_termination, torchrun
from benchmarks.support.paths import TRAIN
from qsdp.common.json_files import write_json
from qsdp.common.user_errors import quoted

NODES, RANKS_PER_NODE = 2, 2
REDUCES = ("flat", "two-hop")
TOLERANCE = 0.03
REDUCE_AT_MOST, STEP_AT_MOST, ONCE_AT_MOST = 0.55, 0.62, 0.51


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes that left a node in a step."""

    bits: int
    what: str
    """``reduce``, ``gather`` or ``step``."""
    reduce: str
    gather: str
    counted: float
    """Bytes by qsdp's counters."""
    seen: float
    """Bytes on the interface."""

    @property
    def difference(self) -> float:
        return self.seen / self.counted - 1


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Bytes of one way over those of another, on the interface."""

    bits: int
    what: str
    value: float
    at_most: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.at_most


def main() -> None:
    arguments = parse()
    exit_on_termination()
    lines: list[Line] = []
    try:
        with tempfile.TemporaryDirectory() as folder, Hosts(NODES) as hosts:
            if "passes" in arguments.parts:
                lines += lines_of_passes(run_passes(hosts, arguments, Path(folder)))
            if "training" in arguments.parts:
                for bits in arguments.bits:
                    for reduce in REDUCES:
                        lines.append(train(hosts, bits, reduce, arguments, Path(folder)))
    except Unavailable as error:
        print(f"error: {quoted(error)}.", file=sys.stderr)
        sys.exit(2)
    ratios = ratios_of(lines)
    described = machine.describe()
    print(table(lines, ratios))
    print(machine.one_line(described))
    if arguments.json is not None:
        record = {
            "machine": described,
            "lines": [asdict(line) | {"difference": line.difference} for line in lines],
            "ratios": [asdict(ratio) | {"is_met": ratio.is_met} for ratio in ratios],
        }
        write_json(arguments.json, record)
    sys.exit(1 if mistakes(lines) or not all(ratio.is_met for ratio in ratios) else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="of W and G")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["passes", "training"],
        default=["passes", "training"],
        help="passes: reduces and gathers alone; training: whole steps",
    )
    parser.add_argument("--passes", type=int, default=10, help="passes of each kind, at least 1")
    parser.add_argument(
        "--steps", nargs=2, type=int, default=[5, 25], help="steps of the short and the long run"
    )
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a run may take")
    arguments = parser.parse_args()
    if not 0 < arguments.steps[0] < arguments.steps[1]:
        parser.error(
            f"--steps is {arguments.steps}: give the shorter run's steps first, at least 1."
        )
    if arguments.passes < 1:
        parser.error(f"--passes is {arguments.passes}: give at least 1.")
    return arguments


def run_passes(hosts: Hosts, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of passes.py."""
    out = folder / "passes.json"
    command = ["-m", "benchmarks.wire.passes", "--bits", *map(str, arguments.bits)]
    command += ["--passes", str(arguments.passes), "--out", str(out)]
    _run(hosts, command, arguments.timeout * len(arguments.bits), folder)
    return json.loads(out.read_text())


def lines_of_passes(rows: list[dict[str, Any]]) -> list[Line]:
    """Reduces and gathers alone, by differences between kinds of pass."""
    lines = []
    by_key = {(row["bits"], row["reduce"], row["gather"], row["kind"]): row for row in rows}
    for row in rows:
        bits, reduce, gather, kind = (row[name] for name in ("bits", "reduce", "gather", "kind"))
        if kind == "forward":
            continue
        kept = by_key[bits, reduce, "twice", "kept"]
        reduce_seen = kept["seen"] - by_key[bits, reduce, "twice", "forward"]["seen"]
        if kind == "kept":
            what, counted, seen = "reduce", row["counted_reduce"], reduce_seen
        else:
            what, counted, seen = "gather", row["counted_gather"], row["seen"] - reduce_seen
        lines.append(
            Line(bits=bits, what=what, reduce=reduce, gather=gather, counted=counted, seen=seen)
        )
    return lines


def train(
    hosts: Hosts, bits: int, reduce: str, arguments: argparse.Namespace, folder: Path
) -> Line:
    """A training step of nano, by the difference of a long and a short run."""
    counted, seen = [], []
    for steps in arguments.steps:
        out = folder / f"{bits}-{reduce}-{steps}"
        out.mkdir()
        command = [str(TRAIN), "--out", str(out), "--steps", str(steps), "--eval-batches", "1"]
        command += ["--eval-every", "0", "--save-every", "0"]
        command += ["--qsdp-bits", str(bits), "--qsdp-reduce", reduce]
        before = hosts.counters()
        _run(hosts, command, arguments.timeout, folder)
        after = hosts.counters()
        sent = [b.sent_payload - a.sent_payload for a, b in zip(before, after, strict=True)]
        seen.append(sum(sent) / len(sent))
        wire = json.loads((out / "summary.json").read_text())["wire"]["inter_node_bytes_per_step"]
        counted.append(steps * RANKS_PER_NODE * (wire["gather"] + wire["reduce"]))
    num_steps = arguments.steps[1] - arguments.steps[0]
    return Line(
        bits=bits,
        what="step",
        reduce=reduce,
        gather="twice",
        counted=(counted[1] - counted[0]) / num_steps,
        seen=(seen[1] - seen[0]) / num_steps,
    )


def _run(hosts: Hosts, command: list[str], timeout: float, folder: Path) -> None:
    """Run a program under torchrun on all nodes; leave with its output if it fails."""
    try:
        hosts.run(
            torchrun(NODES, RANKS_PER_NODE, command),
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            timeout=timeout,
            output=folder,
        )
    except RuntimeError as error:
        logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("host*.log")))
        print(f"{logs}\nerror: {quoted(error)}.", file=sys.stderr)
        sys.exit(1)


def ratios_of(lines: list[Line]) -> list[Ratio]:
    """The ratios with a target, as far as the lines go."""
    seen = {(line.bits, line.what, line.reduce, line.gather): line.seen for line in lines}
    ratios = []
    for bits in dict.fromkeys(line.bits for line in lines):
        for what, at_most in (("reduce", REDUCE_AT_MOST), ("step", STEP_AT_MOST)):
            flat, two_hop = (seen.get((bits, what, reduce, "twice")) for reduce in REDUCES)
            if flat and two_hop:
                ratios.append(
                    Ratio(
                        bits=bits,
                        what=f"{what}, two-hop of flat",
                        value=two_hop / flat,
                        at_most=at_most,
                    )
                )
        once, twice = (seen.get((bits, "gather", "flat", gather)) for gather in ("once", "twice"))
        if once and twice:
            ratios.append(
                Ratio(
                    bits=bits,
                    what="gathers, once of twice",
                    value=once / twice,
                    at_most=ONCE_AT_MOST,
                )
            )
    return ratios


def mistakes(lines: list[Line]) -> list[Line]:
    """Where counters and interface differ too much."""
    return [line for line in lines if abs(line.difference) > TOLERANCE]


def table(lines: list[Line], ratios: list[Ratio]) -> str:
    """Both tables and what is wrong, for a reader."""
    named = {"reduce": "the reduces", "gather": "the gathers", "step": "a training step"}
    rows = [f"bytes that left a node of {RANKS_PER_NODE} ranks in a step, {NODES} nodes"]
    head = (
        f"{'':22}{'reduce':>10}{'gathered':>10}{'counted':>14}{'interface':>14}{'difference':>12}"
    )
    rows.append(head)
    for line in lines:
        what = f"W{line.bits}G{line.bits} {named[line.what]}"
        rows.append(
            f"{what:22}{line.reduce:>10}{line.gather:>10}{line.counted:14,.0f}"
            f"{line.seen:14,.0f}{line.difference:12.2%}"
        )
    for ratio in ratios:
        verdict = "met" if ratio.is_met else "MISSED"
        rows.append(
            f"W{ratio.bits}G{ratio.bits} {ratio.what}: {ratio.value:.3f}, "
            f"at most {ratio.at_most}: {verdict}"
        )
    for line in mistakes(lines):
        rows.append(
            f"W{line.bits}G{line.bits} {named[line.what]}, {line.reduce}, gathered {line.gather}: "
            f"counted and seen bytes differ by {line.difference:+.2%}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
