"""Run a command on N hosts (network namespaces) of this machine and count what crosses the wire.

    sudo python benchmarks/link.py --hosts 2 -- python program.py
    sudo python benchmarks/link.py --hosts 2 --rate 1gbit --nproc-per-node 2 -- program.py --flags

Without --nproc-per-node every host runs the command once and ranks meet through the environment
(RANK, WORLD_SIZE, MASTER_ADDR, ...). With it every host runs torchrun. gloo uses the interface of
the link. At the end each interface's bytes and packets are printed, and written to --json. Linux
only; needs root and iproute2, and exits with status 2 without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from namespaces import HEADER_BYTES, MASTER_PORT, Counters, Hosts, Unavailable, exit_on_termination


def main() -> None:
    arguments = parse()
    exit_on_termination()
    command = arguments.command
    if arguments.nproc_per_node is not None:
        command = torchrun(arguments.hosts, arguments.nproc_per_node, command)
    try:
        with Hosts(arguments.hosts, arguments.rate) as hosts:
            hosts.run(command, timeout=arguments.timeout)
            counters = hosts.counters()
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(table(counters))
    if arguments.json is not None:
        rows = [
            {**dataclasses.asdict(count), "sent_payload": count.sent_payload}
            | {"received_payload": count.received_payload}
            for count in counters
        ]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument("--rate", help="what each host may send at most, for instance 100mbit")
    parser.add_argument(
        "--nproc-per-node", type=int, help="run torchrun with this many ranks a host"
    )
    parser.add_argument("--timeout", type=float, help="seconds after which the command is killed")
    parser.add_argument("--json", type=Path, help="a file for the counters")
    parser.add_argument("command", nargs="+", help="the command, after --")
    return parser.parse_args()


def torchrun(num_hosts: int, nproc_per_node: int, command: list[str]) -> list[str]:
    """The command line that starts `command` with torchrun on every host."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--nnodes", str(num_hosts), "--node-rank", "{host}"]
    launcher += ["--nproc-per-node", str(nproc_per_node)]
    return [*launcher, "--master-addr", "10.77.0.1", "--master-port", str(MASTER_PORT), *command]


def table(counters: list[Counters]) -> str:
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
