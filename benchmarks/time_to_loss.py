"""Seconds of training to a given validation loss, on links of several rates.

    sudo python benchmarks/time_to_loss.py --data tinyshakespeare.txt --out out/time_to_loss

launch/train_gpt.py trains the same model on the same batches over every wire, on hosts (network
namespaces) with one rank each. The loss to reach is what FSDP2 in fp32 had at three quarters of its
steps; between two evaluations it is taken to fall in a straight line. Seconds are those of training
steps, evaluations left out. The steps' seconds and losses of each run are in the record, a plot of
loss over seconds beside it. Root is needed, as for link.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from namespaces import Hosts, Unavailable, exit_on_termination

from qsdp.files import write_json
from qsdp.train.plots import save_png

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train_gpt.py"
FIRST = "FSDP2 fp32"
WIRES = {
    FIRST: [],
    "FSDP2 bf16": ["--precision", "bf16"],
    "qsdp W8G8 gathered once": ["--qsdp-bits", "8", "--qsdp-gather", "once"],
    "qsdp W4G4 gathered once": ["--qsdp-bits", "4", "--qsdp-gather", "once"],
    "qsdp W4G4 gathered once, bf16": [
        *("--qsdp-bits", "4", "--qsdp-gather", "once"),
        *("--precision", "bf16"),
    ],
}
Curve = list[tuple[float, float]]
"""Seconds of training so far and the validation loss then."""


def main() -> None:
    arguments = parse()
    exit_on_termination()
    arguments.out.mkdir(parents=True, exist_ok=True)
    links = []
    try:
        for rate in arguments.rates:
            curves = {}
            for name, flags in WIRES.items():
                curves[name] = train(rate, flags, arguments)
                print(f"{rate}: {name}: {curves[name][-1][0]:.0f} s", file=sys.stderr, flush=True)
            links.append(judge(rate, curves))
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    described = machine.describe()
    record = {"machine": described, "steps": arguments.steps, "links": links}
    write_json(arguments.out / "time_to_loss.json", record)
    for link in links:
        print(f"\n{link['rate']}: seconds to a validation loss of {link['target']:.3f}")
        for row in link["rows"]:
            reached = "never" if row["seconds"] is None else f"{row['seconds']:8.1f}"
            faster = "" if row["faster"] is None else f"{row['faster']:8.2f}x"
            print(f"{row['name']:32}{reached:>9}{faster:>10}   last {row['curve'][-1][1]:.3f}")
    print(machine.one_line(described))
    if not plot(links, arguments.out / "time_to_loss.png"):
        print("no plot: it needs matplotlib")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--model", default="nano", help="a preset")
    parser.add_argument("--steps", type=int, default=400, help="of every run")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "300mbit", "1gbit"])
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument("--out", type=Path, default=Path("out/time_to_loss"), help="a folder")
    arguments = parser.parse_args()
    if arguments.steps < 40:
        parser.error(f"--steps is {arguments.steps}: give at least 40")
    return arguments


def train(rate: str, flags: list[str], arguments: argparse.Namespace) -> Curve:
    """One run from start to end."""
    with (
        tempfile.TemporaryDirectory(prefix="qsdp-time-") as folder,
        Hosts(arguments.hosts, rate, offload=True) as hosts,
    ):
        out = Path(folder, "run")
        command = [sys.executable, str(TRAIN), "--out", str(out), "--data", str(arguments.data)]
        command += ["--model", arguments.model, "--steps", str(arguments.steps)]
        command += ["--eval-every", str(max(1, arguments.steps // 20)), "--save-every", "0", *flags]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        try:
            hosts.run(command, env=threads, output=Path(folder))
        except RuntimeError as error:
            log = Path(folder, "host0.log").read_text()[-3000:]
            raise RuntimeError(f"{error}; the end of its output:\n{log}") from None
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return curve_of(lines)


def curve_of(lines: list[dict[str, Any]]) -> Curve:
    """Where there was an evaluation."""
    seconds, curve = 0.0, []
    for line in lines:
        seconds += line["step_s"]
        if line.get("val_loss") is not None:
            curve.append((seconds, line["val_loss"]))
    return curve


def judge(rate: str, curves: dict[str, Curve]) -> dict[str, Any]:
    """The table of one link."""
    first = curves[FIRST]
    target = first[3 * len(first) // 4 - 1][1]
    base = seconds_to(first, target)
    rows = []
    for name, curve in curves.items():
        reached = seconds_to(curve, target)
        faster = None if reached is None or base is None else base / reached
        rows.append({"name": name, "seconds": reached, "faster": faster, "curve": curve})
    return {"rate": rate, "target": target, "rows": rows}


def seconds_to(curve: Curve, target: float) -> float | None:
    """When the loss was at ``target`` first; None if it never was."""
    before: tuple[float, float] | None = None
    for seconds, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return seconds
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (seconds - before[0])
        before = (seconds, loss)
    return None


def plot(links: list[dict[str, Any]], path: Path) -> bool:
    """Loss over seconds, a panel a link. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(links), figsize=(4.5 * len(links), 3.6), squeeze=False, layout="constrained"
    )
    for axes, link in zip(panels[0], links, strict=True):
        for row in link["rows"]:
            axes.plot(*zip(*row["curve"], strict=True), label=row["name"])
        axes.axhline(link["target"], color="0.7", linewidth=0.8)
        axes.set_title(link["rate"], fontsize=10)
        axes.set_xlabel("seconds of training")
        axes.set_xscale("log")
    panels[0][0].set_ylabel("validation loss, nats")
    panels[0][0].legend(fontsize=7, frameon=False)
    save_png(figure, path)
    return True


if __name__ == "__main__":
    main()
