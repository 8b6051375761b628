"""Hosts with a slow link between them on this machine: run a command there, or compare contestants.

    sudo python -m benchmarks.wire.link --hosts 2 --rate 100mbit
    sudo python -m benchmarks.wire.link --short
    sudo python -m benchmarks.wire.link --hosts 2 --rate 1gbit --nproc-per-node 2 -- program.py
    python -m benchmarks.wire.link --report out/100mbit out/1gbit out/loopback

Hosts are network namespaces. Without a command the contestants of contestants.py train the same GPT
on them, in turns (turns.py): no communication, FSDP2, DDP, DDP with PowerSGD, DeepSpeed ZeRO-3
(where it is installed) and qsdp. Then each trains a small model on real text, without the link, and
its loss stands beside its time (losses.py). In the end a table, link.json and link.png are in
--out. Killed, the same command goes on after the last finished round or training; more --rounds add
to those that are there. --rate loopback compares in plain processes, without hosts or root;
--short is 100 Mbit/s with the floor and six contestants; --report makes one table of several
finished --out.

With a command every host runs it once, and ranks meet through the environment (RANK, WORLD_SIZE,
MASTER_ADDR, ...); with --nproc-per-node every host runs torchrun. gloo uses the interface of the
link. At the end each interface's bytes and packets are printed, and written to --json.

Linux only; hosts need root and iproute2. Exits with status 2 without them and for what cannot be
run, and with 1 if a command fails, or, after a comparison, if a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.support import machine
from benchmarks.support.asked import (
    check_hosts,
    check_least,
    check_rate,
    check_shared,
    check_whole_sequences,
    claimed,
    decide,
)
from benchmarks.support.contestants import SHORT, add_arguments, add_size_arguments
from benchmarks.support.losses import CONTEXT, add_loss_arguments
from benchmarks.support.namespaces import (
    HEADER_BYTES,
    Counters,
    Hosts,
    exit_on_termination,
    torchrun,
)
from benchmarks.support.race import LOOPBACK, begin_losses, link_of, take_losses, take_turns
from benchmarks.support.runs import Mistake, ends_on_error
from benchmarks.wire.link_report import report
from benchmarks.wire.link_table import explanation_table, explanations, plot, table
from benchmarks.wire.link_targets import adds_up, in_words, verdicts
from qsdp.common.json_files import write_json

SHORT_FORM = {"rate": "100mbit", "rounds": 3, "settle": 0, "loss_steps": 200}


def main() -> None:
    arguments = parse()
    exit_on_termination()
    with ends_on_error():
        if arguments.report:
            print(report(arguments.report))
        elif arguments.command:
            check_link(arguments)
            run_command(arguments)
        else:
            check_link(arguments)
            check_comparison(arguments)
            with claimed(arguments.out):
                status = compare(arguments)
            sys.exit(status)


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
    comparison.add_argument(
        "--short", action="store_true", help="the short form: under 8 minutes on two cores"
    )
    comparison.add_argument(
        "--report", type=Path, nargs="+", metavar="OUT", help="make one table of finished folders"
    )
    add_size_arguments(comparison)
    add_arguments(comparison)
    add_loss_arguments(comparison)
    parser.set_defaults(loss_seed=0)
    if parser.parse_args().short:
        parser.set_defaults(**SHORT_FORM, contestants=short_list())
    return parser.parse_args()


def short_list() -> list[str]:
    """The floor and six, in the last place a rival that shards if there is one to run."""
    return [*SHORT, "zero3-fp32" if find_spec("deepspeed") else "qsdp-w8g8-once-fp32"]


def check_link(arguments: argparse.Namespace) -> None:
    """Raise Mistake for hosts or a rate that cannot be."""
    if arguments.rate == LOOPBACK and arguments.command:
        raise Mistake("--rate is loopback, which is for comparisons: run the command by itself.")
    if arguments.short and arguments.command:
        raise Mistake("--short is for comparisons, but a command is given: leave one of them out.")
    check_rate("--rate", arguments.rate)
    check_hosts(arguments)


def check_comparison(arguments: argparse.Namespace) -> None:
    """Raise Mistake for a comparison that cannot be run."""
    check_shared(arguments)
    check_least(arguments, {"loss_steps": 0, "loss_evals": 0, "loss_tokens": CONTEXT})
    if arguments.loss_steps in range(1, 20):
        raise Mistake(f"--loss-steps is {arguments.loss_steps}: give at least 20, or 0 for none.")
    if arguments.loss_evals > arguments.loss_steps > 0:
        raise Mistake(
            f"--loss-evals is {arguments.loss_evals}: give at most {arguments.loss_steps}, one a "
            "step."
        )
    check_whole_sequences(arguments, {"loss_tokens": CONTEXT})
    decide(arguments)


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
    out = arguments.out
    if arguments.loss_steps:
        begin_losses(arguments, out / "losses.json")  # heard of now rather than after turns
    record = take_turns(arguments, out / "turns.json")
    described = machine.describe(arguments.device)
    record |= {"link": link_of(arguments), "hosts": arguments.hosts, "machine": described}
    if arguments.loss_steps:
        record["losses"] = take_losses(arguments, out / "losses.json")
    found = [*verdicts(record), *adds_up(record)]
    record |= {"targets": found, "explanations": explanations(record)}
    write_json(out / "link.json", record)
    print(table(record))
    if record["explanations"]:
        print(f"\n{explanation_table(record['explanations'])}\n")
    for verdict in found:
        print(in_words(verdict))
    print(machine.one_line(described))
    if not plot(record, out / "link.png"):
        print("no plot: it needs matplotlib")
    return 0 if all(verdict["is_met"] for verdict in found) else 1


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
