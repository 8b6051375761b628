"""Seconds of training to a given validation loss, on links of several rates, beside the rivals.

    sudo python -m benchmarks.wire.time_to_loss --data text.txt --seeds 3
    sudo python -m benchmarks.wire.time_to_loss --short

How many steps a loss takes does not depend on the link, and what a step takes does not depend on
the weights: so they are measured apart, with the same model and tokens. For steps every contestant
trains on real text, once a seed, without a slow link (losses.py). For seconds a step they take
turns on each link, as in link.py (turns.py). The loss to reach is what FSDP2 in fp32 has after
three quarters of its steps; the seconds to it are steps times seconds a step.

A table a link, time_to_loss.json and time_to_loss.png (loss over seconds) are in --out. Killed, the
same command goes on after the last finished round or training; more --rounds, --rates and --seeds
add to those that are there. --short takes under 8 minutes on two cores. Links but loopback need
root and iproute2. Exits with status 2 for what cannot be run, and with 1 if a rank fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.support import machine
from benchmarks.support.asked import (
    check_hosts,
    check_least,
    check_rate,
    check_shared,
    claimed,
    decide,
)
from benchmarks.support.contestants import OURS, RIVAL, add_arguments, chosen
from benchmarks.support.losses import CONTEXT, add_loss_arguments
from benchmarks.support.namespaces import exit_on_termination
from benchmarks.support.race import LOOPBACK, begin_losses, take_losses, take_turns
from benchmarks.support.rounds import Record
from benchmarks.support.runs import Mistake, ends_on_error
from benchmarks.wire.time_to_loss_table import FIRST, judge, plot, table
from qsdp.common.json_files import write_json
from qsdp.data.corpus import load_corpus

CONTESTANTS = [
    *(FIRST, "ddp-fp32", "ddp-powersgd-fp32", "zero3-fp32"),
    *("qsdp-w8g8-once-fp32", "qsdp-w4g4-once-fp32"),
]
QUARTERS = 4  # a validation stands at each, so that the loss to reach is one
SHORT_FORM = {"rates": ["100mbit", LOOPBACK], "rounds": 5, "steps": 200, "evals": 8}


def main() -> None:
    arguments = parse()
    exit_on_termination()
    with ends_on_error():
        check(arguments)
        with claimed(arguments.out):
            record = measure(arguments)
            record |= judge(record) | {"machine": machine.describe(arguments.device)}
            write_json(arguments.out / "time_to_loss.json", record)
            print(table(record))
            print(machine.one_line(record["machine"]))
            if not plot(record, arguments.out / "time_to_loss.png"):
                print("no plot: it needs matplotlib")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        default=["100mbit", "1gbit", LOOPBACK],
        help="links: what each host may send at most, or loopback",
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts")
    parser.add_argument(
        "--seeds", type=int, default=1, help="trainings of each contestant, averaged"
    )
    parser.add_argument("--out", type=Path, default=Path("out/time_to_loss"), help="a folder")
    parser.add_argument("--short", action="store_true", help="fewer steps and links")
    add_loss_arguments(parser, prefix="")
    add_arguments(parser)
    parser.set_defaults(contestants=CONTESTANTS, steps=1000, evals=20, rounds=15)
    parser.set_defaults(rate=None, nproc_per_node=None, timeout=None)
    parser.set_defaults(groups=0, context=CONTEXT, vocab_size=1)  # the text has its own
    if parser.parse_args().short:
        parser.set_defaults(**SHORT_FORM)
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raise Mistake for what cannot be run; add what link.py has other flags for."""
    check_shared(arguments)
    check_least(arguments, {"seeds": 1, "steps": 20, "evals": QUARTERS})
    if arguments.evals % QUARTERS or arguments.evals > arguments.steps:
        raise Mistake(
            f"--evals is {arguments.evals}: give a multiple of {QUARTERS}, at most --steps, which "
            f"is {arguments.steps}."
        )
    for rate in arguments.rates:
        check_rate("--rates", rate)
    check_hosts(arguments)
    decide(arguments)
    # A floor's step is no training over a link, and a yardstick stands in no comparison.
    arguments.contestants = [one.name for one in chosen(arguments) if one.role in (RIVAL, OURS)]
    if FIRST not in arguments.contestants:
        raise Mistake(
            f"--contestants and --without leave {FIRST} out, whose loss is to be reached: leave it "
            "in."
        )
    for name in ("model", "steps", "tokens", "evals"):
        setattr(arguments, f"loss_{name}", getattr(arguments, name))
    try:
        arguments.vocab_size = load_corpus(arguments.data).vocab_size
    except ValueError as error:
        raise Mistake(str(error)) from None


def measure(arguments: argparse.Namespace) -> Record:
    """Steps and losses a seed, seconds a step a link."""
    links, losses = [], []
    for seed in range(arguments.seeds):
        arguments.loss_seed = seed
        begin_losses(arguments, losses_of(seed, arguments))  # heard of now, not after turns
    for rate in dict.fromkeys(arguments.rates):
        print(f"turns on {rate}", file=sys.stderr)
        arguments.rate = rate
        turned = take_turns(arguments, arguments.out / f"turns-{rate}.json")
        links.append(turned | {"link": rate, "hosts": arguments.hosts})
    for seed in range(arguments.seeds):
        print(f"trainings of seed {seed}", file=sys.stderr)
        arguments.loss_seed = seed
        losses.append(take_losses(arguments, losses_of(seed, arguments)))
    return {"links": links, "losses": losses}


def losses_of(seed: int, arguments: argparse.Namespace) -> Path:
    """The file of a seed's trainings."""
    out: Path = arguments.out
    return out / f"losses-{seed}.json"


if __name__ == "__main__":
    main()
