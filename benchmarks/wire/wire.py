"""Are the bytes that qsdp says it sends the bytes that cross the wire?

    sudo python -m benchmarks.wire.wire --json wire.json

Runs launch/train_gpt.py on two hosts (network namespaces of this machine, one rank each) and
compares what its counters say with what the hosts' interfaces saw, less packet headers. A step's
bytes are the difference of a long and a short run, divided by the difference of their steps: what a
run sends once (start, validation, checkpoint) is in both and falls out, on both sides alike. What
is left over in the comparison is gloo's own framing, some 150 to 500 bytes a collective and peer.

Stock FSDP2 counts nothing: for it the job computes the bytes from its groups, and from gloo's
reduce-scatter, which sends everything twice.

Exits with status 1 if a run differs by more than 3 %, and with status 2 where network
namespaces cannot be made (Linux, root and iproute2 are needed).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.namespaces import Hosts, Unavailable, exit_on_termination
from benchmarks.support.paths import TRAIN
from qsdp.common.json_files import write_json
from qsdp.common.user_errors import quoted

CASES = {
    "stock": ("stock FSDP2, fp32", []),
    "32": ("qsdp, 32 bits", ["--qsdp-bits", "32"]),
    "16": ("qsdp, 16 bits", ["--qsdp-bits", "16"]),
    "8": ("qsdp, W8G8", ["--qsdp-bits", "8"]),
    "4": ("qsdp, W4G4", ["--qsdp-bits", "4"]),
}
TOLERANCE = 0.03


def main() -> None:
    arguments = parse()
    exit_on_termination()
    rows = []
    try:
        with tempfile.TemporaryDirectory() as folder, Hosts(2) as hosts:
            for case in arguments.cases:
                rows.append(measure(hosts, case, arguments, Path(folder)))
    except Unavailable as error:
        print(f"error: {quoted(error)}.", file=sys.stderr)
        sys.exit(2)
    print(table(rows))
    if arguments.json is not None:
        write_json(arguments.json, rows)
    wrong = [row for row in rows if abs(row["difference"]) > TOLERANCE]
    for row in wrong:
        print(f"{row['case']}: counted and seen bytes differ by {row['difference']:+.2%}")
    sys.exit(1 if wrong else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=[*CASES], default=["stock", "32", "8"], help="what to run"
    )
    parser.add_argument(
        "--steps", nargs=2, type=int, default=[5, 25], help="steps of the short and the long run"
    )
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a run may take")
    parser.add_argument(
        "train_flags",
        nargs="*",
        help="more flags of train_gpt.py, after -- (default: the nano model)",
    )
    arguments = parser.parse_args()
    if not 0 < arguments.steps[0] < arguments.steps[1]:
        parser.error(
            f"--steps is {arguments.steps}: give the shorter run's steps first, at least 1."
        )
    return arguments


def measure(hosts: Hosts, case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row of the table: bytes a rank a step, by the counters and by the interfaces."""
    title, flags = CASES[case]
    flags = [*flags, *arguments.train_flags]
    counted, seen, fp32 = [], [], 0.0
    for steps in arguments.steps:
        out = folder / f"{case}-{steps}"
        out.mkdir()
        before = hosts.counters()
        try:
            hosts.run(command(out, steps, flags), timeout=arguments.timeout, output=folder)
        except RuntimeError as error:
            logs = "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("host*.log")))
            sys.exit(f"{logs}\nerror: {quoted(error)}.")
        after = hosts.counters()
        sent = [b.sent_payload - a.sent_payload for a, b in zip(before, after, strict=True)]
        seen.append(sum(sent) / len(sent))
        wire = json.loads((out / "summary.json").read_text())["wire"]
        counted.append(steps * (wire["sent_bytes_per_step"] + wire["other_bytes_per_step"]))
        fp32 = wire["fp32_bytes_per_step"]
    num_steps = arguments.steps[1] - arguments.steps[0]
    counted_per_step = (counted[1] - counted[0]) / num_steps
    seen_per_step = (seen[1] - seen[0]) / num_steps
    return {
        "case": title,
        "counted_bytes_per_step": counted_per_step,
        "seen_bytes_per_step": seen_per_step,
        "difference": seen_per_step / counted_per_step - 1,
        "fp32_bytes_per_step": fp32,
        "counted_of_fp32": counted_per_step / fp32,
        "seen_of_fp32": seen_per_step / fp32,
    }


def command(out: Path, steps: int, flags: list[str]) -> list[str]:
    """The training job, with nothing in it that repeats but training steps."""
    job = [sys.executable, str(TRAIN), "--out", str(out), "--steps", str(steps)]
    never = str(10**9)
    return [*job, "--eval-every", never, "--save-every", never, "--eval-batches", "1", *flags]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for a reader, in bytes a rank a step."""
    lines = [
        f"{'':20}{'counted':>14}{'on the wire':>14}{'difference':>12}{'counted':>14}{'wire':>8}"
    ]
    lines.append(
        f"{'':20}{'bytes a step':>14}{'bytes a step':>14}{'':12}{'of fp32':>14}{'of fp32':>8}"
    )
    for row in rows:
        lines.append(
            f"{row['case']:20}{row['counted_bytes_per_step']:14,.0f}"
            f"{row['seen_bytes_per_step']:14,.0f}{row['difference']:12.2%}"
            f"{row['counted_of_fp32']:14.4f}{row['seen_of_fp32']:8.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
