"""The paper's experiment in miniature: its ratio of communication to computation, on a slow link.

    sudo python benchmarks/miniature.py --out out/miniature
    sudo python benchmarks/miniature.py --short

QSDP (arXiv 2302.02390) trains GPT 1.3B on 32 V100 in 4 nodes, 512 sequences of 2048 tokens a step
in 4 micro-batches, over links of 10, 50 and 100 Gbit/s, and finds up to 2.2x at 10. In a
micro-batch

- a GPU computes 4 sequences = 8192 tokens, 6 operations a parameter and token and attention's
  12 * 24 layers * 2048 width * 2048 tokens: 7.4e13 operations, 1.8 s at 40 Tflop/s, a third of a
  V100's peak;
- FSDP gathers 1.3e9 weights twice and reduces as many gradients, 4 bytes each; a ring over all GPUs
  takes each of the three into and out of a node once: 15.6 GB, 12.5 s at 10 Gbit/s.

So communication is 6.8 times computation at 10 Gbit/s, 1.4 at 50 and 0.68 at 100. Here the
computation is FSDP2's in fp32 over one rank; the link is slowed until the same three transfers take
that many times as long. They are those of the same fp32 values over qsdp's collectives: gloo's
reduce-scatter sends twice what a ring does, so FSDP2 itself, which stands beside, is slower here
than in the paper. Ratios are medians over rounds. Killed, the same command goes on after the last
finished round; root is needed, as for link.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import machine
from asked import check_each_least, check_hosts, check_shared, claimed
from contestants import add_arguments, add_size_arguments
from link_table import plot, table
from link_table import ratio as ratio_of_rows
from namespaces import exit_on_termination
from race import device_of, take_turns
from runs import ends_on_error

from qsdp.files import write_json

OPERATIONS = 8192 * (6 * 1.3e9 + 12 * 24 * 2048 * 2048)
COMPUTE_S = OPERATIONS / 40e12
NODE_BYTES = 3 * 4 * 1.3e9
ASKED = 2.2
SAME_VALUES, OURS = "qsdp-w32g32-twice-fp32", "qsdp-w8g8-twice-fp32"
CONTESTANTS = (
    "fsdp-alone-fp32",
    "fsdp-fp32",
    SAME_VALUES,
    "qsdp-w8g8-*-fp32",
    "qsdp-w4g4-once-*",
)


def ratio(gbit: float) -> float:
    """Communication over computation in the paper's setting."""
    return NODE_BYTES * 8 / (gbit * 1e9) / COMPUTE_S


def main() -> None:
    arguments = parse()
    exit_on_termination()
    with ends_on_error():
        check_shared(arguments)
        check_each_least("--gbit", arguments.gbit, 0.1)
        check_hosts(arguments)
        arguments.device = device_of(arguments)
        with claimed(arguments.out):
            # How long the computation takes, and how much fp32 values send: the rate follows.
            arguments.rate, arguments.contestants = "10gbit", ["fsdp-alone-fp32", SAME_VALUES]
            alone, sharded = take_turns(arguments, arguments.out / "pace.json")["rows"]
            compute_s = statistics.median(alone["seconds"])
            sent_bytes = statistics.median(sharded["sent_bytes"])
            arguments.contestants = list(CONTESTANTS)
            results = [at(gbit, compute_s, sent_bytes, arguments) for gbit in arguments.gbit]
    described = machine.describe(arguments.device)
    write_json(arguments.out / "miniature.json", {"machine": described, "links": results})
    for result in results:
        print(f"\nthe paper's {result['gbit']:g} Gbit/s: {result['rate']}, communication ", end="")
        print(f"{result['ratio']:.2f} times computation\n{table(result)}")
        print("W8G8 gathered twice, the paper's way, ", end="")
        print(f"is {result['of_fsdp']:.2f}x as fast as FSDP2 in fp32, ", end="")
        print(f"{result['speed_up']:.2f}x as the same values in fp32", end="")
        if result["gbit"] == 10:
            met = "met" if result["speed_up"] >= ASKED else "MISSED"
            print(f" (the paper: up to {ASKED}; to reach at least {ASKED}: {met})", end="")
        print()
    print(machine.one_line(described))
    sys.exit(0 if all(r["gbit"] != 10 or r["speed_up"] >= ASKED for r in results) else 1)


def at(
    gbit: float, compute_s: float, sent_bytes: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All contestants on the link that stands for one of the paper's."""
    kbit = round(8 * sent_bytes / (ratio(gbit) * compute_s) / 1e3)
    arguments.rate = f"{kbit}kbit"
    record = take_turns(arguments, arguments.out / f"turns-{gbit:g}gbit.json")
    record |= {"hosts": arguments.hosts, "link": f"{kbit / 1e3:.0f} Mbit/s"}
    rows = {row["name"]: row for row in record["rows"]}
    plot(record, arguments.out / f"miniature-{gbit:g}gbit.png")
    return record | {
        "gbit": gbit,
        "rate": record["link"],
        "ratio": ratio(gbit),
        "of_fsdp": ratio_of_rows(rows["fsdp-fp32"], rows[OURS]),
        "speed_up": ratio_of_rows(rows[SAME_VALUES], rows[OURS]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gbit", nargs="+", type=float, default=[10, 50, 100], help="the paper's")
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument("--out", type=Path, default=Path("out/miniature"), help="a folder")
    parser.add_argument("--short", action="store_true", help="two points, in some minutes")
    parser.set_defaults(nproc_per_node=None, timeout=None)
    add_size_arguments(parser)
    add_arguments(parser)
    if parser.parse_args().short:
        parser.set_defaults(gbit=[10, 100], rounds=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
