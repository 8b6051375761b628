"""How long a save holds up training, at once and beside it (--save-async).

    torchrun --standalone --nproc-per-node 2 -m benchmarks.saving.saving --model gpt2

Saves a GPT with AdamW's state between steps, both ways in turns. Measured are what a save takes of
the training loop, the median over rounds, and the steps that run while the other ranks' and this
rank's files are written: the writing takes processor time of theirs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.support import machine
from qsdp import checkpoint
from qsdp.commands.exit import end_process
from qsdp.common.allocator import keep_freed_memory
from qsdp.common.json_files import write_json
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the trainer does
    dist.init_process_group("gloo")
    row = measure(arguments)
    if dist.get_rank() == 0:
        described = machine.describe()
        print(
            f"{arguments.model}, {row['bytes'] / 1e6:.0f} MB in a checkpoint: a save takes "
            f"{row['now_s']:.3f} s of the training loop, beside training {row['beside_s']:.3f} s; "
            f"it is on disk {row['written_s']:.3f} s later. A step takes {row['step_s']:.3f} s, "
            f"while a checkpoint is written {row['busy_step_s']:.3f} s"
        )
        print(machine.one_line(described))
        if arguments.json is not None:
            write_json(arguments.json, {"machine": described, "row": row})
        sys.stdout.flush()
    dist.barrier()
    end_process(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="mini", help="preset of GPTConfig, models/gpt2/presets.py"
    )
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="a rank and step, at least 2")
    parser.add_argument("--threads", type=int, default=1, help="of torch, a rank")
    parser.add_argument("--folder", type=Path, help="where to save; unset: a temporary one")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    model = GPT(GPTConfig.from_preset(arguments.model, vocab_size=256))
    init_weights(model, 0)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(256, (1, arguments.tokens))

    def step() -> float:
        started = time.perf_counter()
        model(tokens, tokens)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    folders = [tempfile.mkdtemp(prefix="qsdp-saving-", dir=arguments.folder)]
    dist.broadcast_object_list(folders)
    root = Path(folders[0])
    times: dict[str, list[float]] = {n: [] for n in ("now", "beside", "written", "step", "busy")}
    step()
    with checkpoint.AsyncSaver() as saver:
        for number in range(2 * arguments.rounds):
            times["step"].append(step())
            dist.barrier()
            started = time.perf_counter()
            if number % 2:
                saver.save(root, number, model, optimizer, {}, keep=1)
                times["beside"].append(time.perf_counter() - started)
                times["busy"].append(step())
                saver.wait()
                times["written"].append(time.perf_counter() - started - times["beside"][-1])
            else:
                checkpoint.save(root, number, model, optimizer, {}, keep=1)
                times["now"].append(time.perf_counter() - started)
    num_bytes = sum(path.stat().st_size for path in root.glob("*/*"))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "bytes": num_bytes,
        "now_s": medians["now"],
        "beside_s": medians["beside"],
        "written_s": medians["written"],
        "step_s": medians["step"],
        "busy_step_s": medians["busy"],
    }


if __name__ == "__main__":
    main()
