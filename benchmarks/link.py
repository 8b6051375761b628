"""Hosts with a slow link between them on this machine: run a command there, or compare contestants.

    sudo python benchmarks/link.py --hosts 2 --rate 100mbit
    sudo python benchmarks/link.py --hosts 2 --rate 1gbit --nproc-per-node 2 -- program.py --flags

Hosts are network namespaces. Without a command the contestants of contestants.py train the same GPT
on them, in turns: no communication, FSDP2, DDP, DeepSpeed ZeRO-3 (where it is installed) and qsdp.
Every ratio is the median over rounds of two steps of the same round. At the end a table, link.json
and link.png are in --out. `--rate loopback` compares in plain processes, without hosts or root.

With a command every host runs it once, and ranks meet through the environment (RANK, WORLD_SIZE,
MASTER_ADDR, ...); with --nproc-per-node every host runs torchrun. gloo uses the interface of the
link. At the end each interface's bytes and packets are printed, and written to --json.

Linux only; hosts need root and iproute2. Exits with status 2 without them, and with 1 if a command
fails, or, after a comparison, if a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
from contestants import add_arguments, contestants, is_chosen
from link_table import adds_up, plot, table, verdicts
from namespaces import HEADER_BYTES, MASTER_PORT, Counters, Hosts, Unavailable, exit_on_termination

from qsdp.files import write_json

LOOPBACK = "loopback"


def main() -> None:
    arguments = parse()
    exit_on_termination()
    try:
        if arguments.command:
            run_command(arguments)
        else:
            sys.exit(compare(arguments))
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument(
        "--rate", help="what each host may send at most, for instance 100mbit; else no limit"
    )
    parser.add_argument(
        "--nproc-per-node", type=int, help="run torchrun, with so many ranks a host"
    )
    parser.add_argument("--timeout", type=float, help="seconds after which the command is killed")
    parser.add_argument("command", nargs="*", help="the command, after --")
    parser.add_argument("--json", type=Path, help="a file for a command's counters")
    comparison = parser.add_argument_group("comparison")
    comparison.add_argument("--out", type=Path, default=Path("out/link"), help="a folder")
    add_arguments(comparison)
    arguments = parser.parse_args()
    if arguments.rate == LOOPBACK and arguments.command:
        parser.error("--rate is loopback, which is for comparisons: run the command by itself")
    if not arguments.command:
        if arguments.rounds < 1 or arguments.warmup < 0:
            parser.error(
                f"--rounds is {arguments.rounds} and --warmup {arguments.warmup}: give at least "
                "1 and 0"
            )
        if not any(is_chosen(one.name, arguments) for one in contestants()):
            names = ", ".join(one.name for one in contestants())
            parser.error(f"--contestants and --without leave none of {names}")
    return arguments


def run_command(arguments: argparse.Namespace) -> None:
    """Run the command on all hosts and print what crossed the link."""
    command = arguments.command
    if arguments.nproc_per_node is not None:
        command = torchrun(arguments.hosts, arguments.nproc_per_node, command)
    with Hosts(arguments.hosts, arguments.rate) as hosts:
        hosts.run(command, timeout=arguments.timeout)
        counters = hosts.counters()
    print(counters_table(counters))
    if arguments.json is not None:
        rows = [
            {**dataclasses.asdict(count), "sent_payload": count.sent_payload}
            | {"received_payload": count.received_payload}
            for count in counters
        ]
        write_json(arguments.json, rows)


def compare(arguments: argparse.Namespace) -> int:
    """Let the contestants take turns; print, write and draw. Returns the exit status."""
    without = [*arguments.without]
    if find_spec("deepspeed") is None:
        without.append("zero3-*")
        print("DeepSpeed is not installed: pip install 'qsdp[deepspeed]' for its rows")
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = take_turns(arguments, without)
    described = machine.describe()
    link = LOOPBACK if arguments.rate == LOOPBACK else arguments.rate or "no limit"
    record |= {"link": link, "hosts": arguments.hosts, "machine": described}
    found = [*verdicts(record), *adds_up(record)]
    record["targets"] = found
    write_json(arguments.out / "link.json", record)
    print(table(record))
    for verdict in found:
        limit = f"at {'least' if verdict['is_least'] else 'most'} {verdict['limit']}"
        state = "met" if verdict["is_met"] else "MISSED"
        print(f"{verdict['what']}: {verdict['value']:.3f}, {limit}: {state}")
    print(machine.one_line(described))
    if not plot(record, arguments.out / "link.png"):
        print("no plot: it needs matplotlib")
    return 0 if all(verdict["is_met"] for verdict in found) else 1


def take_turns(arguments: argparse.Namespace, without: list[str]) -> dict[str, Any]:
    """What contestants.py writes."""
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "DS_ACCELERATOR": "cpu"}
    nproc = arguments.nproc_per_node
    with tempfile.TemporaryDirectory(prefix="qsdp-link-") as folder:
        out = Path(folder) / "rows.json"
        command = [str(Path(__file__).with_name("contestants.py")), "--out", str(out)]
        names = ("model", "groups", "tokens", "context", "rounds", "warmup", "settle", "threads")
        for name in names:
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--contestants", *arguments.contestants]
        command += ["--without", *without] if without else []
        if arguments.rate == LOOPBACK:
            ranks = str(arguments.hosts * (nproc or 1))
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", ranks, *command]
            done = subprocess.run(launcher, env=os.environ | environment, check=False)
            if done.returncode:
                raise RuntimeError(f"contestants.py failed with status {done.returncode}")
        else:
            launched = (
                [sys.executable, *command]
                if nproc is None
                else torchrun(arguments.hosts, nproc, command)
            )
            with Hosts(arguments.hosts, arguments.rate, offload=True) as hosts:
                hosts.run(launched, env=environment, timeout=arguments.timeout)
        record: dict[str, Any] = json.loads(out.read_text())
        return record


def torchrun(num_hosts: int, nproc_per_node: int, command: list[str]) -> list[str]:
    """The command line that starts `command` with torchrun on every host."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--nnodes", str(num_hosts), "--node-rank", "{host}"]
    launcher += ["--nproc-per-node", str(nproc_per_node)]
    return [*launcher, "--master-addr", "10.77.0.1", "--master-port", str(MASTER_PORT), *command]


def counters_table(counters: list[Counters]) -> str:
    """One line a host."""
    head = ["sent bytes", "packets", "less headers", "sent twice"]
    head += ["received bytes", "packets", "less headers"]
    lines = ["host" + "".join(f"{name:>16}" for name in head)]
    for host, count in enumerate(counters):
        row = [count.sent_bytes, count.sent_packets, count.sent_payload]
        row += [count.retransmitted_segments]
        row += [count.received_bytes, count.received_packets, count.received_payload]
        lines.append(f"{host:4}" + "".join(f"{value:16,}" for value in row))
    lines.append(f"(headers: {HEADER_BYTES} bytes a packet; sent twice: TCP segments)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
