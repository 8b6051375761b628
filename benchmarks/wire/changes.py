"""What does gather="delta" send: bytes on the interface between two steps of one training.

    sudo python -m benchmarks.wire.changes --data tinyshakespeare.txt

Trains on two hosts (network namespaces of this machine, a rank each), and reads the hosts'
interfaces and qsdp's counters at two steps of the same run, whose learning rate is planned for
--steps: before step 100, where the rate is highest, and after the last one (nano), or after step
140, where the run is ended (the 19m model of link.py). The counters tell gathers from reduces,
and their sum is held against the interface, less packet headers. Bytes a parameter count each
value once: twice what one of two ranks sends.

The cases of --parts bytes have limits: weights of 4 and 8 bits, gradients of 4 and 3, both models.
Those of --parts rates are nano's at other learning rates, and with 3 bits, for the plot: share of
changed codes and bytes of each step. Every case leaves a JSON file in --out, with its series, and
the same command goes on where it stopped.

Exits with status 1 if a limit is missed, and with status 2 where network namespaces cannot be made
(Linux, root and iproute2 are needed).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support import machine
from benchmarks.support.asked import check_least, check_rate
from benchmarks.support.namespaces import Hosts, exit_on_termination
from benchmarks.support.runs import Mistake, Run, ends_on_error, read_records
from benchmarks.wire.changes_table import name_of, plot, table, verdicts
from qsdp.common.flags import flag
from qsdp.common.json_files import write_json

NUM_HOSTS = 2
LR, STEPS, SINCE = 1e-3, 1000, 100
PARTS = ("bytes", "rates")
MEASURED = ((4, 4), (4, 3), (8, 4))  # bits of weights and gradients
RATES = {3e-3: (3, 4, 8), LR: (3,), 3e-4: (3, 4, 8)}  # bits of weights
ENDED_AFTER = 40
"""Steps between the readings of a model that is too large to be trained to its end."""
SHORT = {"models": ["nano"], "parts": ["bytes"], "steps": 60, "since": 20}


def main() -> None:
    arguments = parse()
    exit_on_termination()
    with ends_on_error():
        check(arguments)
        runs = plan(arguments)
        records = read_records(arguments.out, runs)
        missing = [run for run in runs if run.name not in records]
        print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
        if missing:
            with Hosts(NUM_HOSTS, arguments.rate) as hosts:
                for run in missing:
                    records[run.name] = record = train(hosts, run, arguments)
                    write_json(arguments.out / f"{run.name}.json", record)
                    print(f"{name_of(record)}: {record['seconds']:.0f} s", flush=True)
    done = [records[run.name] for run in runs]
    print(table(done))
    found = verdicts(done, LR, STEPS, SINCE)
    for each in found:
        state = "met" if each["is_met"] else "MISSED"
        print(f"{each['what']}: {each['measured']:.3f}, at most {each['at_most']}: {state}")
    print(machine.one_line(done[-1]["machine"]))
    rows = [{key: value for key, value in record.items() if key != "series"} for record in done]
    write_json(arguments.out / "changes.json", {"rows": rows, "targets": found})
    if not plot(done, arguments.out / "changes.png"):
        print("no plot: it needs matplotlib, and nano's whole trainings")
    sys.exit(0 if all(each["is_met"] for each in found) else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="stdlib", help="'stdlib', or a text file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=("nano", "19m"), default=["nano", "19m"])
    parser.add_argument("--steps", type=int, default=STEPS, help="that the rate is planned for")
    parser.add_argument("--since", type=int, default=SINCE, help="steps before the first reading")
    parser.add_argument("--batch-size", type=int, default=6, help="sequences of 64 a rank")
    parser.add_argument("--rate", help="what each host may send at most, as 100mbit; else no limit")
    parser.add_argument("--short", action="store_true", help="nano alone, 60 steps, no limits")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    parser.add_argument("--out", type=Path, default=Path("out/changes"), help="a folder")
    if parser.parse_args().short:
        parser.set_defaults(**SHORT)
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raise Mistake for what cannot be measured."""
    check_least(arguments, {"since": 1, "batch_size": 1})
    check_rate("--rate", arguments.rate)
    if arguments.steps <= arguments.since:
        raise Mistake(
            f"--steps is {arguments.steps} with --since {arguments.since}: give more steps than "
            "there are before the first reading."
        )
    if arguments.data != "stdlib" and not Path(arguments.data).is_file():
        raise Mistake(f"--data is {arguments.data}: give stdlib, or a text file.")


def plan(arguments: argparse.Namespace) -> list[Run]:
    """All cases, those with limits first."""
    cases = [
        (model, *bits, LR)
        for model in arguments.models
        for bits in MEASURED
        if "bytes" in arguments.parts
    ]
    if "rates" in arguments.parts and "nano" in arguments.models:
        cases += [("nano", bits, 4, lr) for lr, all_bits in RATES.items() for bits in all_bits]
    runs = []
    for model, weight_bits, grad_bits, lr in cases:
        to = arguments.steps if model == "nano" else arguments.since + ENDED_AFTER
        settings: dict[str, Any] = {
            "model": model,
            "weight_bits": weight_bits,
            "grad_bits": grad_bits,
            "lr": lr,
            "steps": arguments.steps,
            "since": arguments.since,
            "to": min(to, arguments.steps),
            "batch_size": arguments.batch_size,
        }
        flags = [text for key, value in settings.items() for text in (flag(key), str(value))]
        flags += ["--data", arguments.data]
        settings["data"] = Path(arguments.data).name
        runs.append(Run(f"{model}-w{weight_bits}g{grad_bits}-lr{lr:g}", settings, flags))
    return runs


def train(hosts: Hosts, run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one case.

    Raises RuntimeError if it fails, and prints the end of the first host's log.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qsdp-changes-") as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-m", "benchmarks.wire.changes_rank", *run.flags]
        try:
            hosts.run(
                [*command, "--out", str(out)],
                env={"OMP_NUM_THREADS": "1"},
                timeout=arguments.timeout,
                output=Path(folder),
            )
        except RuntimeError:
            print(Path(folder, "host0.log").read_text()[-3000:], file=sys.stderr)
            raise
        found: dict[str, Any] = json.loads(out.read_text())
    seconds = round(time.monotonic() - started, 1)
    return run.settings | found | {"seconds": seconds, "machine": machine.describe()}


if __name__ == "__main__":
    main()
