"""One host's rank of changes.py: a run on gather="delta", with its bytes at two of its steps.

Training is that of launch/train_gpt.py, by its own parts, with nothing between the steps: no
validation, no checkpoint. Before the first and after the last step that is asked for, all ranks
meet and read their host's interface and qsdp's counters. Rank 0 writes what was found.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

import qsdp
from benchmarks.support.steps import MODELS, size_of
from benchmarks.wire.passes import state
from qsdp.commands.exit import end_process
from qsdp.common.allocator import keep_freed_memory
from qsdp.common.json_files import write_json
from qsdp.data.batches import Batches
from qsdp.data.corpus import load_corpus
from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.models.gpt2.config import GPTConfig
from qsdp.train.config import TrainConfig
from qsdp.train.loop import learning_rate
from qsdp.train.make_optimizer import make_optimizer
from qsdp.train.parallelize import parallelize
from qsdp.train.world import World, open_world

PRESET = "nano"
CHANGES = ("changed_codes", "redrawn_buckets")
AVERAGED = 10
"""Steps whose means are one line of the series."""


def main() -> None:
    arguments = parse()
    with open_world(backend="gloo") as world:
        found = train(world, arguments)
        if world.is_main:
            write_json(arguments.out, found)
        dist.barrier()
    end_process(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=(PRESET, *MODELS), required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, required=True, help="that the rate is planned for")
    parser.add_argument("--since", type=int, required=True, help="steps before the first reading")
    parser.add_argument("--to", type=int, required=True, help="steps before the second, the last")
    parser.add_argument("--weight-bits", type=int, required=True)
    parser.add_argument("--grad-bits", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def train(world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    """Take the steps.

    Returns what was used between the readings, means over ranks, and this rank's series: means of
    ten steps each, from the second on, for the first sends all.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    corpus = load_corpus(arguments.data)
    config = TrainConfig.of(
        model=PRESET,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        qsdp_weight_bits=arguments.weight_bits,
        qsdp_grad_bits=arguments.grad_bits,
        qsdp_gather="delta",
    )
    run = config.run
    size = (
        GPTConfig.from_preset(PRESET, vocab_size=corpus.vocab_size)
        if arguments.model == PRESET
        else size_of(arguments.model, corpus.vocab_size, run.seq_len)
    )
    sharded = parallelize(config, size, world)
    model, handle = sharded.model, cast(qsdp.Handle, sharded.handle)
    optimizer = make_optimizer(config, model)
    batches = Batches(corpus.train, run.batch_size, run.seq_len, run.seed, world.rank, world.size)
    rows: list[dict[str, float]] = []
    before = read(handle)
    for step in range(arguments.to):
        if step == arguments.since:
            before = read(handle)
        counts = handle.traffic.snapshot()
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, loss = model(*batches.get(step))
        loss.backward()
        clip_grad_norm_(model.parameters(), run.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"step": step + 1, "lr": rate, "loss": loss.item(), **used(counts, handle)})
    after = read(handle)
    names = list(after)
    means = [each / world.size for each in world.sum(*(after[n] - before[n] for n in names))]
    parameters = list(model.parameters())
    return {
        **dict(zip(names, means, strict=True)),
        "ranks": world.size,
        "parameters": sum(p.numel() for p in parameters),
        # What has one dimension travels as it is.
        "coded": sum(p.numel() for p in parameters if p.dim() > 1),
        "first_gather_bytes": rows[0]["gather_sent_bytes"],
        "series": [
            mean_of(rows[begin : begin + AVERAGED]) for begin in range(1, len(rows), AVERAGED)
        ],
    }


def read(handle: qsdp.Handle) -> dict[str, int]:
    """What this host's interface and the counters say when all ranks have come so far."""
    counts = handle.traffic.snapshot()
    return state(handle) | {name: counts.get(name, 0) for name in CHANGES}


def used(before: dict[str, int], handle: qsdp.Handle) -> dict[str, int]:
    """What a step has taken: bytes that this rank sent, and what all ranks said has changed."""
    after = handle.traffic.snapshot()
    names = ("gather_sent_bytes", "reduce_sent_bytes", *CHANGES)
    return {name: after.get(name, 0) - before.get(name, 0) for name in names}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over steps, by the number of the last."""
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means | {"step": rows[-1]["step"]}


if __name__ == "__main__":
    main()
