"""Whether training on a quantized wire follows full precision on a GPU that ranks share.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.quality.gpu_training --json gpu.json

Trains gpt2 (124M, its own vocabulary, of which bytes are used) in bf16 on text, from the same
weights and on the same batches: at 32 bits, 8 and 4 bits through qsdp's own collectives, each
plain and with CrAM+. A loss is the mean over ranks and the last steps; a difference is to the run
at 32 bits of the same method. Step times are medians; over gloo the wire goes through the host's
memory, so they rank the runs and say nothing of NCCL. Without a GPU it trains on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsdp
from benchmarks.support import machine
from qsdp.commands.exit import end_process, leave
from qsdp.common.gpu_streams import to_device
from qsdp.common.json_files import write_json
from qsdp.common.user_errors import UserError
from qsdp.data.batches import Batches
from qsdp.data.corpus import Corpus, load_corpus
from qsdp.methods.clip_grad import clip_grad_norm_
from qsdp.methods.cram.optimizer import CrAM
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.sparsity.local_shards import local_shard
from qsdp.train.config import TrainConfig
from qsdp.train.make_optimizer import make_optimizer
from qsdp.train.parallelize import shard_model
from qsdp.train.run_flags import BACKENDS
from qsdp.train.world import World, open_world

BITS = (32, 8, 4)
METHODS = ("plain", "CrAM+")


def main() -> None:
    arguments = parse()
    try:
        with open_world(backend=arguments.backend) as world:
            rows = measure(world, arguments)
            if world.is_main:
                report(rows, world, arguments)
    except UserError as error:
        leave(error)
    end_process(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="a preset")
    parser.add_argument("--data", default="stdlib", help="stdlib or a text file, read as bytes")
    parser.add_argument("--steps", type=int, default=60, help="of every run")
    parser.add_argument("--last", type=int, default=10, help="steps whose losses are averaged")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a rank")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--backend", default="gloo", choices=BACKENDS, help="nccl: a GPU a rank")
    parser.add_argument("--json", type=Path, help="a file for the table")
    return parser.parse_args()


def measure(world: World, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every run, alike on all ranks."""
    corpus = load_corpus(arguments.data, "byte")
    # A preset without a vocabulary takes that of bytes.
    own = {} if arguments.model.startswith("gpt") else {"vocab_size": corpus.vocab_size}
    size = GPTConfig.from_preset(arguments.model, **own)
    start: list[Tensor] = []  # drawn once
    rows: list[dict[str, Any]] = []
    for method in arguments.methods:
        for bits in arguments.bits:
            row = {"method": method, "bits": bits} | run(
                world, arguments, corpus, size, start, method, bits
            )
            rows.append(row)
            if world.is_main:
                print(f"{method} at {bits} bits: {row['loss']:.4f}", flush=True)
    return with_differences(rows)


def run(
    world: World,
    arguments: argparse.Namespace,
    corpus: Corpus,
    size: GPTConfig,
    start: list[Tensor],
    method: str,
    bits: int,
) -> dict[str, Any]:
    """Train one model; its losses are means over ranks."""
    config = TrainConfig.of(
        model=arguments.model,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        lr=arguments.lr,
        precision="bf16",
        qsdp_bits=bits,
        cram=method == "CrAM+",
    )
    assert config.qsdp is not None
    model = shard_model(config, size, world, world.mesh)
    fill(model, start, config.run.seed)
    handle = qsdp.install(model, config.qsdp)
    optimizer = make_optimizer(config, model)
    if isinstance(optimizer, CrAM):
        optimizer.share_support(handle.set_support)
    batches = Batches(
        corpus.train,
        config.run.batch_size,
        config.run.seq_len,
        config.run.seed,
        world.rank,
        world.size,
    )
    losses, seconds = [], []
    for step in range(arguments.steps):
        inputs_BT, targets_BT = (to_device(t, world.device) for t in batches.get(step))

        def closure(inputs_BT: Tensor = inputs_BT, targets_BT: Tensor = targets_BT) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(inputs_BT, targets_BT)[1]
            loss.backward()
            if not isinstance(optimizer, CrAM):  # which clips by itself
                clip_grad_norm_(model.parameters(), config.run.clip_grad)
            return loss.detach()

        for group in optimizer.param_groups:
            group["lr"] = config.run.lr * min(1.0, 10 * (step + 1) / arguments.steps)
        began = time.perf_counter()
        loss = optimizer.step(closure)
        losses.append(world.sum(loss)[0] / world.size)  # waits for the device
        seconds.append(time.perf_counter() - began)
    sent = handle.traffic.snapshot()
    num_parameters = sum(p.numel() for p in model.parameters())
    return {
        "loss": statistics.mean(losses[-arguments.last :]),
        "losses": losses,
        "step_s": statistics.median(seconds[1:] or seconds),
        "sent_bytes_a_step": (sent["gather_sent_bytes"] + sent["reduce_sent_bytes"])
        / arguments.steps,
        "times_s": handle.times.snapshot(),
        "parameters": num_parameters,
    }


def fill(model: nn.Module, start: list[Tensor], seed: int) -> None:
    """Give ``model`` the initial weights, which the first call draws into ``start``."""
    with torch.no_grad():
        if not start:
            init_weights(model, seed)
            start += [local_shard(p).values.clone() for p in model.parameters()]
        for parameter, values in zip(model.parameters(), start, strict=True):
            local_shard(parameter).values.copy_(values)


def with_differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its loss less that of the same method at the most bits; None there."""
    baselines = {}
    for row in rows:
        best = baselines.setdefault(row["method"], row)
        if row["bits"] > best["bits"]:
            baselines[row["method"]] = row
    for row in rows:
        baseline = baselines[row["method"]]
        row["difference"] = None if row is baseline else row["loss"] - baseline["loss"]
    return rows


def report(rows: list[dict[str, Any]], world: World, arguments: argparse.Namespace) -> None:
    """Print the table, and write it."""
    described = machine.describe(machine.device())
    print(
        f"{arguments.model} ({rows[0]['parameters'] / 1e6:.0f}M), {world.size} ranks over "
        f"{world.backend} on {world.device.type}, bf16, {arguments.steps} steps of "
        f"{world.size * arguments.batch_size * arguments.seq_len} tokens"
    )
    print(f"{'method':8}{'bits':>5}{'loss':>9}{'less 32 bits':>14}{'ms a step':>11}{'MB sent':>9}")
    for row in rows:
        less = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        figures = f"{1e3 * row['step_s']:11.0f}{row['sent_bytes_a_step'] / 1e6:9.1f}"
        print(f"{row['method']:8}{row['bits']:5}{row['loss']:9.4f}{less:>14}{figures}")
    print(machine.one_line(described))
    if arguments.json is not None:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        record = {"machine": described, "settings": settings, "rows": rows}
        write_json(arguments.json, record)


if __name__ == "__main__":
    main()
