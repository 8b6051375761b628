"""One rank of link.py's other half: every contestant's loss after the same steps on real text.

Contestants train one after the other, without a slow link, from the same weights on the same
batches in the same order; the floor takes the whole batch in one process. Rank 0 adds each to a
file when it has ended, and a call for the same file goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.support.contestants import (
    FLOOR,
    Contestant,
    add_arguments,
    add_size_arguments,
    trained,
)
from benchmarks.support.ranks import Ranks
from benchmarks.support.rounds import read
from benchmarks.support.steps import LR, MODELS, Ready, parameters
from qsdp.commands.exit import end_process
from qsdp.common.json_files import write_json
from qsdp.data.batches import Batches, eval_batches
from qsdp.data.corpus import Corpus, load_corpus
from qsdp.train.config import TrainConfig
from qsdp.train.loop import learning_rate

CONTEXT = 64  # short, as steps must be many
EVAL_TOKENS = 1 << 16
CURVE_TOKENS = 1 << 14  # often, so fewer
BEGINNING = 10
"""One step in so many is warm-up, and before PowerSGD compresses.
torch's documentation advises it.
"""
SCHEDULE = "warm-up over a tenth of the steps, then a cosine to a tenth of the rate"


def main() -> None:
    arguments = parse()
    ranks = Ranks.meet(arguments)
    train_all(arguments, ranks)
    ranks.barrier()
    end_process(0)


def train_all(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Add the losses that the file lacks."""
    arguments.tokens, arguments.context = arguments.loss_tokens, CONTEXT
    corpus = load_corpus(arguments.data)
    record: dict[str, Any] = ranks.decided(lambda: read(arguments.out))
    # After DeepSpeed's the last bits of others' sums are not what they are without it.
    for one in sorted(trained(arguments), key=lambda one: one.name.startswith("zero3")):
        if one.name in record["rows"]:
            continue
        record["rows"][one.name] = row = train(one, ranks, corpus, arguments)
        if ranks.rank == 0:
            write_json(arguments.out, record)
        ranks.say(f"{one.name}: validation loss {row['val_loss']:.3f}, {row['seconds']:.0f} s")
        gc.collect()  # the model is in circles of modules and hooks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_size_arguments(parser)
    add_arguments(parser)
    add_loss_arguments(parser)
    parser.add_argument("--loss-seed", type=int, default=0, help="of weights, batches and wires")
    parser.add_argument("--out", type=Path, required=True, help="the file of losses")
    return parser.parse_args()


def add_loss_arguments(parser: argparse._ActionsContainer, prefix: str = "loss-") -> None:
    """Add what the driver hands through for losses only."""
    parser.add_argument("--data", default="stdlib", help="'stdlib', or a text file, for losses")
    parser.add_argument(
        f"--{prefix}model", choices=MODELS, default="1m", help="which trains, for losses"
    )
    parser.add_argument(
        f"--{prefix}steps", type=int, default=300, help="of that training; link.py: 0 for none"
    )
    parser.add_argument(f"--{prefix}tokens", type=int, default=384, help="of its, a rank and step")
    parser.add_argument(
        f"--{prefix}evals",
        type=int,
        default=0,
        help="validations on the way, spread evenly, the last of them after the last step",
    )


def powersgd_start(steps: int) -> int:
    """The first of so many steps whose gradients PowerSGD compresses."""
    return max(2, steps // BEGINNING)


def eval_steps(steps: int, evals: int) -> list[int]:
    """After which steps, counted from 1, there is a validation on the way."""
    return [round(steps * (place + 1) / evals) for place in range(evals)]


def train(
    one: Contestant, ranks: Ranks, corpus: Corpus, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A contestant's losses, in nats a token.

    They are of training the mean over the last tenth, of validation that after the last step, and
    the curve of (step, validation loss on fewer tokens).
    """
    steps = arguments.loss_steps
    setting = ranks.setting(
        arguments,
        arguments.loss_model,
        corpus.vocab_size,
        powersgd_start(steps),
        arguments.loss_seed,
    )
    schedule = TrainConfig.of(lr=LR, steps=steps, warmup_steps=steps // BEGINNING)
    ready = one.make(setting)
    share = 1 if one.role != FLOOR else ranks.size
    batch, world, rank = setting.batch * share, ranks.size // share, ranks.rank
    if share > 1:
        rank = 0
    batches = Batches(corpus.train, batch, arguments.context, arguments.loss_seed, rank, world)

    def val_loss(num_tokens: int) -> float:
        num_batches = max(1, num_tokens // (batch * world * arguments.context))
        held_out = eval_batches(corpus.val, batch, arguments.context, num_batches, rank, world)
        return validate(ready, held_out, ranks)

    started, tail = time.perf_counter(), max(1, steps // 10)
    evaluated, curve = eval_steps(steps, arguments.loss_evals), []
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for step in range(steps):
        for group in ready.optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        loss = ready.step(*(part.to(ranks.device) for part in batches.get(step)))
        if step >= steps - tail:
            loss_sum += loss.double()
        if step + 1 in evaluated:
            curve.append([step + 1, val_loss(CURVE_TOKENS)])
    seconds = time.perf_counter() - started
    train_sum = loss_sum.cpu()
    dist.all_reduce(train_sum, group=ranks.control)
    return {
        "train_loss": float(train_sum) / (tail * ranks.size),
        "val_loss": val_loss(EVAL_TOKENS),
        "curve": curve,
        "seconds": seconds,
        "parameters": parameters(setting.size),
    }


def validate(ready: Ready, batches: Any, ranks: Ranks) -> float:
    """Mean of the loss over all ranks' targets, of the exact weights.

    Training goes on after it as without it.
    """
    val_sum, num_tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    exact = contextlib.nullcontext() if ready.handle is None else ready.handle.exact()
    ready.model.eval()
    with torch.no_grad(), exact:
        for inputs_BT, targets_BT, count in batches:
            _, loss = ready.model(inputs_BT.to(ranks.device), targets_BT.to(ranks.device))
            val_sum += count * loss.double()
            num_tokens += count
    ready.model.train()
    sums = torch.stack([val_sum.cpu(), torch.tensor(num_tokens, dtype=torch.float64)])
    dist.all_reduce(sums, group=ranks.control)
    return float(sums[0] / sums[1])


if __name__ == "__main__":
    main()
