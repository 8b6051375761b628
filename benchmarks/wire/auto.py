"""Whether what --qsdp-bits auto chooses is the fastest, on links of several rates.

    sudo python -m benchmarks.wire.auto --rates 100mbit 1gbit loopback --out out/auto
    sudo python -m benchmarks.wire.auto --short

Hosts are network namespaces with one rank each, as for link.py; loopback is plain processes. On
each link the GPT of link.py's contestants is measured several times as launch/train_gpt.py would
before its first step, and each time a choice is made. Then all that could have been chosen, and the
rivals, take turns on the same link, as in link.py. The table has a step's seconds as predicted and
as measured; what was chosen is held against the best that could have been chosen, the best that
shards, and the best of all. auto.json and the rounds are in --out; killed, the same command goes on
after the last finished round.

Linux only; hosts need root and iproute2. Exits with status 2 without them, and with 1 if a choice
takes more than 1.10 of the best, or making it more than 10 s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import machine
from benchmarks.support.asked import (
    check_hosts,
    check_least,
    check_rate,
    check_shared,
    claimed,
    decide,
)
from benchmarks.support.contestants import OURS, RIVAL, add_arguments, add_size_arguments
from benchmarks.support.contestants import chosen as contestants_of
from benchmarks.support.namespaces import exit_on_termination
from benchmarks.support.race import LOOPBACK, run_here, run_on_hosts, settings_of, take_turns
from benchmarks.support.rounds import SLOW_ROUNDS, SLOW_S, kept, read
from benchmarks.support.runs import Mistake, ends_on_error
from benchmarks.support.steps import size_of
from benchmarks.wire.link_table import median_of, ratio
from benchmarks.wire.link_targets import at_most, in_words
from qsdp.commands.exit import end_process
from qsdp.common.flags import flag
from qsdp.common.json_files import write_json
from qsdp.train.auto.choose import choose
from qsdp.train.config import TrainConfig
from qsdp.train.run_flags import PRECISIONS
from qsdp.train.world import open_world

WITHIN, AT_MOST_S = 1.10, 10.0
SHARED = ("model", "tokens", "context", "vocab_size")
RIVALS = ("ddp", "ddp-powersgd", "zero3")


def main() -> None:
    arguments = parse()
    if arguments.worker is not None:
        work(arguments)
        return
    exit_on_termination()
    with ends_on_error():
        check_shared(arguments)
        check_least(arguments, {"choices": 1, "hosts": 2})
        if arguments.groups:
            raise Mistake(
                f"--groups is {arguments.groups}, but auto chooses for blocks that are a group "
                "each: leave it out."
            )
        for rate in arguments.rates:
            check_rate("--rates", rate)
        check_hosts(arguments)
        decide(arguments)
        with claimed(arguments.out):
            links = [on_link(rate, arguments) for rate in dict.fromkeys(arguments.rates)]
            described = machine.describe(arguments.device)
            write_json(arguments.out / "auto.json", {"machine": described, "links": links})
    for link in links:
        print(f"\n{table(link)}")
    print(machine.one_line(described))
    met = [verdict["is_met"] for link in links for verdict in link["verdicts"]]
    sys.exit(0 if all(met) else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts, one rank each")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", LOOPBACK])
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--choices", type=int, default=3, help="times that auto decides, a link")
    parser.add_argument("--out", type=Path, default=Path("out/auto"), help="a folder")
    parser.add_argument("--short", action="store_true", help="two links, some minutes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_size_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(rounds=7, nproc_per_node=None, timeout=None)
    if parser.parse_args().short:
        parser.set_defaults(rates=["100mbit", LOOPBACK], rounds=3, without=["zero3-*", "ddp-fp32"])
    return parser.parse_args()


def on_link(rate: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The choices made on one link, the turns taken there, and what is to be said of both."""
    chosen = argparse.Namespace(**vars(arguments) | {"rate": rate})
    found = choices(chosen)
    rivals = [f"{name}-{chosen.precision}" for name in RIVALS]
    chosen.contestants = [*ways_of(found), *(chosen.contestants or rivals)]
    names = {one.name for one in contestants_of(chosen)}
    left_out = {choice["choice"] for choice in found} - names
    if left_out:
        raise Mistake(f"--without leaves out {min(left_out)}, which auto chose: let it take part.")
    record = take_turns(chosen, chosen.out / f"turns-{rate}.json")
    return {"rate": rate, "choices": found, "verdicts": verdicts(rate, found, record), **record}


def ways_of(found: list[dict[str, Any]]) -> list[str]:
    """The contestants that some choice could have come to."""
    return [*dict.fromkeys(name for choice in found for name in choice["predicted_s"])]


def choices(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the ranks decided, now or in an earlier call."""
    settings = settings_of(arguments)
    for name in ("contestants", "warmup", "settle", "groups", "powersgd_rank"):
        del settings[name]
    settings |= {name: getattr(arguments, name) for name in ("precision", "choices")}
    path = arguments.out / f"choices-{arguments.rate}.json"
    record = kept(path, settings, {"choices": []})
    if not record["choices"]:
        command = ["-m", "benchmarks.wire.auto", "--worker", str(path)]
        for name in (*SHARED, "threads", "precision", "choices", "device"):
            command += [flag(name), str(getattr(arguments, name))]
        run = run_here if arguments.rate == LOOPBACK else run_on_hosts
        run(command, arguments)
        record = read(path)
    found: list[dict[str, Any]] = record["choices"]
    return found


def work(arguments: argparse.Namespace) -> None:
    """Measure and decide on this rank, with all others."""
    torch.set_num_threads(arguments.threads)
    if os.environ.get("LOCAL_WORLD_SIZE") == "1":  # the hosts are one machine: see Ranks.meet
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    size = size_of(arguments.model, arguments.vocab_size, arguments.context)
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    config = TrainConfig.of(
        qsdp_bits="auto",
        precision=arguments.precision,
        seq_len=arguments.context,
        batch_size=arguments.tokens // arguments.context,
        backend=backend,
    )
    found = []
    with open_world(backend=backend) as world:
        for _ in range(arguments.choices):
            choice = choose(config, size, world)
            found.append(
                {
                    "choice": contestant(choice.what, arguments.precision),
                    "line": choice.line,
                    "took_s": choice.took_s,
                    "predicted_s": {
                        contestant(way, arguments.precision): seconds
                        for way, seconds in choice.predicted_s.items()
                    },
                    "measured": choice.measured,
                }
            )
        if world.is_main:
            write_json(arguments.worker, read(arguments.worker) | {"choices": found})
    end_process(0)


def contestant(way: str, precision: str) -> str:
    """The name that link.py has for one of the cost model's ways."""
    bits, _, gather = way.partition(" bits gathered ")
    if not gather:  # stock FSDP2, which reduces in fp32 at either precision, as the trainer does
        return "fsdp-fp32" if precision == "fp32" else "fsdp-bf16-fp32-reduce"
    return f"qsdp-w{bits}g{bits}-{gather}-{precision}"


def verdicts(
    rate: str, found: list[dict[str, Any]], record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each way that was chosen against the best."""
    rows = {row["name"]: row for row in record["rows"]}
    rivals = [row for row in rows.values() if row["role"] == RIVAL]
    fields = {
        "that could be chosen": [rows[name] for name in ways_of(found) if name in rows],
        "rival that shards": [row for row in rivals if row["shards"]],
        "of all": [row for row in rows.values() if row["role"] in (RIVAL, OURS)],
    }
    took_s = max(choice["took_s"] for choice in found)
    what = f"{rate}: seconds that the longest of {len(found)} choices took"
    judged = [at_most(what, took_s, AT_MOST_S)]
    for name in dict.fromkeys(choice["choice"] for choice in found):
        times = sum(choice["choice"] == name for choice in found)
        for kind, field in fields.items():
            if not field:
                continue
            best = min(field, key=median_of)
            what = (
                f"{rate}: {rows[name]['what']}, chosen {times} of {len(found)} times, is times as "
                f"long as the best {kind}, {best['what']}"
            )
            judged.append(at_most(what, ratio(rows[name], best), WITHIN))
    return judged


def table(link: dict[str, Any]) -> str:
    """Predicted and measured, a line a contestant."""
    found = link["choices"]
    rounds = max(len(row["seconds"]) for row in link["rows"])
    lines = [
        f"{link['rate']}: {link['parameters'] / 1e6:.1f}M parameters, {link['ranks']} ranks, "
        f"{link['tokens']} tokens a rank and step; {len(found)} choices, medians of {rounds} "
        f"rounds, {SLOW_ROUNDS} where a step takes over {SLOW_S:.0f} s",
        found[0]["line"],
        f"{'ms a step':42}{'predicted':>10}{'measured':>10}{'spread':>14}",
    ]
    for row in link["rows"]:
        name = row["name"]
        predicted = [c["predicted_s"][name] for c in found if name in c["predicted_s"]]
        guess = f"{1e3 * statistics.median(predicted):.0f}" if predicted else ""
        spread = f"{1e3 * min(row['seconds']):.0f}-{1e3 * max(row['seconds']):.0f}"
        mark = "  <- chosen" if any(c["choice"] == name for c in found) else ""
        line = f"{row['what']:42}{guess:>10}{1e3 * median_of(row):10.0f}{spread:>14}{mark}"
        lines.append(line)
    return "\n".join([*lines, *(in_words(verdict) for verdict in link["verdicts"])])


if __name__ == "__main__":
    main()
