"""What a pruned weight costs on the wire: bits a prunable weight in AC/DC's compressed phases.

    sudo python -m benchmarks.wire.sparse --json sparse.json

Two hosts of one rank (network namespaces of this machine). A GPT of 5 million parameters is trained
for some steps with AC/DC, until its first compressed phase: its mask is one that training made, not
a random one, and the ranks' shares of it differ. Then passes of each kind are counted at the
interface, less packet headers, as in passes.py: gathers and reduces apart, with whole weights, with
the mask, and with nothing kept. What is sent with nothing kept is the rest of the model
(embeddings, norms); the difference is what the prunable weights cost, metadata included, and is
divided by those of them that a rank sends. The exchange of masks, one bit a weight once a phase, is
shown apart.

Exits with status 1 if at 8 bits and 90 % a gather takes more than 1.0 bits a prunable weight or a
reduce more than 1.2, and with status 2 where network namespaces cannot be made (Linux, root and
iproute2 are needed).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import qsdp
from benchmarks.support import machine
from benchmarks.support.namespaces import Hosts, Unavailable, exit_on_termination, torchrun
from benchmarks.wire.passes import SIZE, build, forward, forward_backward, run, state
from qsdp.commands.exit import end_process
from qsdp.common.json_files import write_json
from qsdp.common.user_errors import quoted
from qsdp.sparsity.local_shards import local_shard

NUM_HOSTS = 2
GATHER_AT_MOST, REDUCE_AT_MOST = 1.0, 1.2
SUPPORTS = ("whole", "mask", "nothing")


def main() -> None:
    arguments = parse()
    if "RANK" in os.environ:
        count(arguments)
        return
    exit_on_termination()
    try:
        with tempfile.TemporaryDirectory() as folder, Hosts(NUM_HOSTS) as hosts:
            out = Path(folder) / "rows.json"
            command = ["-m", "benchmarks.wire.sparse", *sys.argv[1:], "--out", str(out)]
            try:
                environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
                hosts.run(
                    torchrun(NUM_HOSTS, 1, command),
                    env=environment,
                    timeout=arguments.timeout,
                    output=Path(folder),
                )
            except RuntimeError as error:
                logs = sorted(Path(folder).glob("host*.log"))
                print("\n".join(log.read_text()[-3000:] for log in logs), file=sys.stderr)
                print(f"error: {quoted(error)}.", file=sys.stderr)
                sys.exit(1)
            rows = json.loads(out.read_text())
    except Unavailable as error:
        print(f"error: {quoted(error)}.", file=sys.stderr)
        sys.exit(2)
    described = machine.describe()
    print(table(rows, arguments.sparsity))
    print(machine.one_line(described))
    if arguments.json is not None:
        record = {"machine": described, "sparsity": arguments.sparsity, "rows": rows}
        write_json(arguments.json, record)
    sys.exit(0 if all(is_met(row) for row in rows) else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="of W and G")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the prunable weights")
    parser.add_argument("--steps", type=int, default=40, help="trained before the mask is taken")
    parser.add_argument("--passes", type=int, default=5, help="of each kind, at least 1")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds it may take")
    parser.add_argument("--json", type=Path, help="a file for the table")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def count(arguments: argparse.Namespace) -> None:
    """On a host: train, then count passes; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [row_of(bits, arguments) for bits in arguments.bits]
    if dist.get_rank() == 0:
        write_json(arguments.out, rows)
    dist.barrier()
    end_process(0)


def row_of(bits: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bits a prunable weight and pass at ``bits``, by support and direction."""
    weights, masks = trained(bits, arguments)
    sent: dict[tuple[str, str], float] = {}
    exchanged = 0.0
    for support in SUPPORTS:
        for kind in ("forward", "kept", "step"):
            config = qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits)
            model, handle = build(config, reshard_after_forward=kind != "kept")
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, values in weights.items():
                    local_shard(parameters[name]).values.copy_(values)
                    if support == "nothing" and name in masks:
                        local_shard(parameters[name]).values.zero_()
            if support != "whole":
                before = state(handle)["seen"]
                handle.set_support(
                    {
                        parameters[name]: mask if support == "mask" else torch.zeros_like(mask)
                        for name, mask in masks.items()
                    }
                )
                exchanged = state(handle)["seen"] - before
            one_pass = forward if kind == "forward" else forward_backward
            tokens = torch.arange(SIZE.context)[None] % SIZE.vocab_size
            run(model, tokens, one_pass)
            before = state(handle)["seen"]
            for _ in range(arguments.passes):
                run(model, tokens, one_pass)
            sent[support, kind] = (state(handle)["seen"] - before) / arguments.passes
    total = sent_by_all(sum(mask.numel() for mask in masks.values()))
    row: dict[str, Any] = {"bits": bits, "prunable": int(total)}
    row["kept"] = sent_by_all(sum(int(m.sum()) for m in masks.values())) / total
    # In one gather a rank sends its half; in one reduce it sends the other rank's.
    per_weight = 8 / (total / NUM_HOSTS)
    reduces = {s: sent[s, "kept"] - sent[s, "forward"] for s in SUPPORTS}
    gathers = {s: (sent[s, "step"] - reduces[s]) / 2 for s in SUPPORTS}
    for direction, bytes_of in (("gather", gathers), ("reduce", reduces)):
        for support in ("whole", "mask"):
            saved = mean_over_ranks(bytes_of[support] - bytes_of["nothing"])
            row[f"{direction}_{support}"] = saved * per_weight
    row["exchange"] = mean_over_ranks(exchanged) * per_weight
    return row


def trained(
    bits: int, arguments: argparse.Namespace
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """This rank's shards and masks, by name, in AC/DC's first compressed phase."""
    model, handle = build(
        qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits), reshard_after_forward=True
    )
    steps = arguments.steps
    schedule = qsdp.ACDCSchedule(
        steps=steps + 1, warmup=steps, phase=1, last_dense=0, last_sparse=1
    )
    optimizer = qsdp.ACDC(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        schedule=schedule,
        target=arguments.sparsity,
    )
    source = bytearray(Path(__file__).read_bytes())
    text = torch.frombuffer(source, dtype=torch.uint8) % SIZE.vocab_size
    for step in range(steps):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        starts = torch.randint(len(text) - SIZE.context - 1, (4,), generator=generator)
        rows = torch.stack([text[i : i + SIZE.context + 1].long() for i in starts.tolist()])
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
    masks = {name: local_shard(mask).values for name, mask in optimizer.masks().items()}
    weights = {name: local_shard(p).values.clone() for name, p in model.named_parameters()}
    handle.remove()
    return weights, masks


def sent_by_all(count: int) -> float:
    """The sum of every rank's ``count``."""
    total = torch.tensor([float(count)], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def mean_over_ranks(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def is_met(row: dict[str, Any]) -> bool:
    """Whether the 8-bit row meets its targets; other rows have none."""
    within = row["gather_mask"] <= GATHER_AT_MOST and row["reduce_mask"] <= REDUCE_AT_MOST
    return row["bits"] != 8 or within


def table(rows: list[dict[str, Any]], sparsity: float) -> str:
    """Rows for a reader."""
    lines = [
        f"bits a prunable weight on the interface, AC/DC at {sparsity:.0%}, "
        f"{rows[0]['prunable']:,} prunable weights, {NUM_HOSTS} hosts",
        f"{'':8}{'kept':>8}{'gather':>10}{'gather':>10}{'reduce':>10}{'reduce':>10}{'masks,':>12}",
        f"{'':16}{'whole':>10}{'pruned':>10}{'whole':>10}{'pruned':>10}{'once':>12}",
    ]
    for row in rows:
        verdict = "" if row["bits"] != 8 else ("  met" if is_met(row) else "  MISSED")
        lines.append(
            f"W{row['bits']}G{row['bits']}    {row['kept']:8.3f}{row['gather_whole']:10.3f}"
            f"{row['gather_mask']:10.3f}{row['reduce_whole']:10.3f}{row['reduce_mask']:10.3f}"
            f"{row['exchange']:12.3f}{verdict}"
        )
    lines.append(f"(targets at 8 bits: gather {GATHER_AT_MOST}, reduce {REDUCE_AT_MOST})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
