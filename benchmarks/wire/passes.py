"""The program that benchmarks/wire/nodes.py runs on its nodes: passes of a GPT, and who sent what.

Started by torchrun on hosts whose link is ``eth0``. Each phase repeats one kind of pass, and
between barriers rank 0 of each node reads what left its interface, less packet headers; qsdp's
counters are read at the same places. Three kinds of pass tell gathers from reduces:

    forward   without autograd: every group is gathered once
    kept      forward and backward, weights kept from one to the other: the same gathers, and the
              reduces; less ``forward`` it is what the reduces sent
    step      forward and backward as training does them: less the reduces it is what the gathers of
              a training step sent
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from benchmarks.support.namespaces import HEADER_BYTES, INTERFACE
from qsdp.commands.exit import end_process
from qsdp.common.json_files import write_json
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT

SIZE = GPTConfig(vocab_size=64, num_layers=6, num_heads=4, width=256, context=32, bias=False)
KINDS = ("forward", "kept", "step")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", nargs="+", type=int, required=True)
    parser.add_argument("--passes", type=int, required=True, help="of each kind")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, written by rank 0")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rows: list[dict[str, Any]] = []
    for bits in arguments.bits:
        for reduce in ("flat", "two-hop"):
            for gather in ("twice", "once"):
                if gather == "once" and reduce == "two-hop":
                    continue
                config = qsdp.QSDPConfig(
                    weight_bits=bits, grad_bits=bits, reduce=reduce, gather=gather
                )
                for kind in KINDS if gather == "twice" else ["step"]:
                    row = measure(config, kind, arguments.passes)
                    rows.append({"bits": bits, "reduce": reduce, "gather": gather, **row})
    if dist.get_rank() == 0:
        write_json(arguments.out, rows)
    dist.barrier()
    end_process(0)


def measure(config: qsdp.QSDPConfig, kind: str, num_passes: int) -> dict[str, Any]:
    """Bytes that one node sent to others in one pass: the mean over nodes and passes."""
    model, handle = build(config, reshard_after_forward=kind != "kept")
    tokens = torch.randint(SIZE.vocab_size, (1, SIZE.context))
    one_pass = forward if kind == "forward" else forward_backward
    run(model, tokens, one_pass)
    before = state(handle)
    for _ in range(num_passes):
        run(model, tokens, one_pass)
    after = state(handle)
    mine = {name: after[name] - before[name] for name in after}
    everyone: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    num_nodes = dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
    total = {name: sum(each[name] for each in everyone) for name in mine}
    per_pass = {name: count / num_nodes / num_passes for name, count in total.items()}
    return {"kind": kind} | per_pass


def build(config: qsdp.QSDPConfig, *, reshard_after_forward: bool) -> tuple[GPT, qsdp.Handle]:
    """A model sharded as launch/train_gpt.py shards it, and its wire."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = GPT(SIZE)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return model, qsdp.install(model, config)


def run(model: GPT, tokens: torch.Tensor, one_pass: Callable[[GPT, torch.Tensor], None]) -> None:
    """Take one pass, after which no weights are gathered."""
    one_pass(model, tokens)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forward(model: GPT, tokens: torch.Tensor) -> None:
    """Gather every group once."""
    with torch.no_grad():
        model(tokens, tokens)


def forward_backward(model: GPT, tokens: torch.Tensor) -> None:
    """Do a training step without the optimizer."""
    _, loss = model(tokens, tokens)
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def state(handle: qsdp.Handle) -> dict[str, int]:
    """What the node has sent so far, by its interface, and what this rank has, by the counters.

    Rank 0 of the node reads the interface.
    """
    dist.barrier()
    counts = handle.traffic.snapshot()
    return {
        "seen": sent_payload() if os.environ["LOCAL_RANK"] == "0" else 0,
        "counted_gather": counts["gather_inter_node_bytes"],
        "counted_reduce": counts["reduce_inter_node_bytes"],
    }


def sent_payload() -> int:
    """Bytes that left this process's host, less packet headers."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            fields = numbers.split()
            return int(fields[8]) - HEADER_BYTES * int(fields[9])
    raise SystemExit(f"error: this host has no interface {INTERFACE}.")


if __name__ == "__main__":
    main()
