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
from contestants import FLOOR, Contestant, add_arguments, trained
from ranks import Ranks
from rounds import read
from steps import MODELS, Ready, parameters

from qsdp.data import Batches, Corpus, eval_batches, load_corpus
from qsdp.files import write_json
from qsdp.train.world import end_process

CONTEXT = 64  # short, as steps must be many
EVAL_TOKENS = 1 << 16
POWERSGD_START = 10  # after one step in so many, as torch's documentation advises


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
    add_arguments(parser)
    add_loss_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file of losses")
    return parser.parse_args()


def add_loss_arguments(parser: argparse._ActionsContainer) -> None:
    """What the driver hands through for losses only."""
    parser.add_argument("--data", default="stdlib", help="'stdlib', or a text file, for losses")
    parser.add_argument("--loss-model", choices=MODELS, default="1m", help="which trains for them")
    parser.add_argument("--loss-steps", type=int, default=300, help="of that model; 0: no losses")
    parser.add_argument("--loss-tokens", type=int, default=384, help="of its, a rank and step")


def train(
    one: Contestant, ranks: Ranks, corpus: Corpus, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A contestant's losses, in nats a token: of training the mean over the last tenth."""
    steps = arguments.loss_steps
    setting = ranks.setting(
        arguments, arguments.loss_model, corpus.vocab_size, max(2, steps // POWERSGD_START)
    )
    ready = one.make(setting)
    share = 1 if one.role != FLOOR else ranks.size
    batch, world, rank = setting.batch * share, ranks.size // share, ranks.rank
    if share > 1:
        rank = 0
    batches = Batches(corpus.train, batch, arguments.context, 0, rank, world)
    started, tail = time.perf_counter(), max(1, steps // 10)
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for step in range(steps):
        loss = ready.step(*(part.to(ranks.device) for part in batches.get(step)))
        if step >= steps - tail:
            loss_sum += loss.double()
    seconds = time.perf_counter() - started
    num_batches = max(1, EVAL_TOKENS // (batch * world * arguments.context))
    held_out = eval_batches(corpus.val, batch, arguments.context, num_batches, rank, world)
    val_sum, num_tokens = validate(ready, held_out, ranks)
    sums = torch.stack(
        [loss_sum.cpu(), val_sum.cpu(), torch.tensor(num_tokens, dtype=torch.float64)]
    )
    dist.all_reduce(sums, group=ranks.control)
    return {
        "train_loss": float(sums[0]) / (tail * ranks.size),
        "val_loss": float(sums[1] / sums[2]),
        "seconds": seconds,
        "parameters": parameters(setting.size),
    }


def validate(ready: Ready, batches: Any, ranks: Ranks) -> tuple[torch.Tensor, int]:
    """Sum of the loss over this rank's targets, of the exact weights, and their number."""
    val_sum, num_tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    exact = contextlib.nullcontext() if ready.handle is None else ready.handle.exact()
    ready.model.eval()
    with torch.no_grad(), exact:
        for inputs_BT, targets_BT, count in batches:
            _, loss = ready.model(inputs_BT.to(ranks.device), targets_BT.to(ranks.device))
            val_sum += count * loss.double()
            num_tokens += count
    return val_sum, num_tokens


if __name__ == "__main__":
    main()
