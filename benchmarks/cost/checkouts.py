"""A step of this checkout beside a step of another one: what a change costs.

    python -m benchmarks.cost.checkouts ../other-checkout

Both train the same small GPT over gloo. Each has its own ranks, which stay alive and take turns:
rounds alternate, so that a noisy machine is noisy for both. Printed are the median ratio of their
times and the bytes that each sends in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout whose native library is built")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="for each of the two")
    parser.add_argument("--steps", type=int, default=10, help="a round")
    parser.add_argument(
        "--preset", default="nano", help="the model; see qsdp/models/gpt2/presets.py"
    )
    parser.add_argument("--method", choices=["AdamW", "CrAM"], default="AdamW")
    parser.add_argument("--gather", choices=["twice", "once"], default="twice")
    parser.add_argument("--frozen", action="store_true", help="train the table of positions alone")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        serve(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Let both checkouts take turns, and print what they took."""
    checkouts = {"this": ROOT, "other": arguments.other.resolve()}
    for name, folder in checkouts.items():
        if not (folder / "qsdp" / "__init__.py").exists():
            sys.exit(f"error: {name} checkout {folder} has no qsdp: give the root of a checkout.")
    with tempfile.TemporaryDirectory() as stores:
        worlds = {
            name: [
                _start(folder, arguments, rank, f"{stores}/{name}")
                for rank in range(arguments.ranks)
            ]
            for name, folder in checkouts.items()
        }
        times: dict[str, list[float]] = {name: [] for name in worlds}
        sent: dict[str, int] = {}
        for number in range(-2, arguments.rounds):  # two to warm up
            for name, ranks in list(worlds.items())[:: 1 if number % 2 else -1]:
                found = _round(ranks)
                if number >= 0:
                    times[name].append(found["seconds"])
                    sent[name] = found["bytes"]
        for ranks in worlds.values():
            for process in ranks:
                process.communicate("\n")
    print(
        f"{arguments.preset}, {arguments.ranks} ranks, {arguments.method}, "
        f"gather {arguments.gather}{', all but the positions frozen' * arguments.frozen}"
    )
    for name, seconds in times.items():
        print(f"{name:>6}: {1e3 * statistics.median(seconds):8.2f} ms a step, {sent[name]} bytes")
    ratios = sorted(a / b for a, b in zip(times["this"], times["other"], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(
        f" ratio: {statistics.median(ratios):.3f} (median of {len(ratios)}; half of them from "
        f"{low:.3f} to {high:.3f})"
    )


def _start(
    folder: Path, arguments: argparse.Namespace, rank: int, store: str
) -> subprocess.Popen[str]:
    # By its path: as a module it would find this checkout before the other one.
    command = [sys.executable, __file__, str(folder), f"--rank={rank}", f"--store={store}"]
    for name in ("ranks", "steps", "preset", "method", "gather"):
        command.append(f"--{name}={getattr(arguments, name)}")
    command += ["--frozen"] * arguments.frozen
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _round(ranks: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """What the first rank says of a round that all take."""
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [process.stdout.readline() for process in ranks if process.stdout is not None]
    if not all(lines):
        sys.exit("error: a rank has ended: see its error above.")
    found: dict[str, Any] = json.loads(lines[0])
    return found


def serve(arguments: argparse.Namespace) -> None:
    """Train as one rank, a round for every line that is read."""
    # An editable installation would bring its own checkout, whatever the path says.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
    import time

    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    import qsdp

    try:
        from qsdp.models.gpt2.config import GPTConfig
        from qsdp.models.gpt2.model import GPT
    except ModuleNotFoundError:  # a checkout of before these files were
        from qsdp.models import GPT, GPTConfig

    assert Path(qsdp.__file__).is_relative_to(arguments.other), "not the checkout to be measured"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.store}",
        rank=arguments.rank,
        world_size=arguments.ranks,
    )
    torch.manual_seed(0)
    config = GPTConfig.from_preset(arguments.preset, vocab_size=256)
    model = GPT(config)
    if arguments.frozen:
        model.requires_grad_(False)
        model.position.requires_grad_(True)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    handle = qsdp.install(model, qsdp.QSDPConfig(gather=arguments.gather))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    if arguments.method == "CrAM":
        optimizer = qsdp.CrAM(model, optimizer)
    tokens = torch.randint(256, (2, 4, config.context))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(tokens[0], tokens[1])[1]
        loss.backward()
        return loss

    for _ in sys.stdin:
        if _ == "\n":
            break
        dist.barrier()
        before = handle.traffic.snapshot()
        seconds = []
        for _ in range(arguments.steps):
            started = time.perf_counter()
            optimizer.step(closure)
            seconds.append(time.perf_counter() - started)
        after = handle.traffic.snapshot()
        sent = sum(
            after[f"{d}_sent_bytes"] - before[f"{d}_sent_bytes"] for d in ("gather", "reduce")
        )
        found = {"seconds": statistics.median(seconds), "bytes": sent // arguments.steps}
        print(json.dumps(found), flush=True)
    os._exit(0)  # as qsdp's end_process does, which an older checkout may lack


if __name__ == "__main__":
    main()
