"""What LoRA sends: a frozen base that is gathered once, and adapters at 8 bits.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.wire.adapters --json adapters.json

Trains LoRA on a small Llama from its config, the same one each time: by stock FSDP2, with a base of
8 and of 4 bits that is gathered for every pass, and with the wire of qsdp.integrations.peft. Shows
what this rank has sent as qsdp counts it (of stock FSDP2, what these gathers send in fp32), and the
last loss, a mean over ranks. It takes seconds, with transformers and peft.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import qsdp
from benchmarks.support import machine
from qsdp.commands.exit import end_process
from qsdp.common.json_files import write_json

VOCAB, CONTEXT, BATCH_SIZE = 96, 16, 4
BUCKET = 64
"""Values of a bucket: the matrices are small."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training."""

    name: str
    gathered: int
    """Bytes that rank 0 has sent in gathers, and in reduces."""
    reduced: int | None
    fp32: int
    """Bytes of the same gathers in fp32."""
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of each training")
    parser.add_argument("--rank", type=int, default=4, help="of LoRA's matrices")
    parser.add_argument("--json", type=Path, help="a file for the table, written by rank 0")
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("one rank gathers nothing: start two or more with torchrun.")
    dist.init_process_group("gloo")
    rows = measure(arguments.steps, arguments.rank)
    if dist.get_rank() == 0:
        described = machine.describe()
        print(table(rows, arguments.steps))
        print(machine.one_line(described))
        if arguments.json is not None:
            lines = [asdict(row) for row in rows]
            write_json(arguments.json, {"machine": described, "rows": lines})
    dist.barrier()
    end_process(0)


def measure(steps: int, rank: int) -> list[Row]:
    """Train each way."""
    from qsdp.integrations import peft

    twice = [qsdp.QSDPConfig(weight_bits=bits, bucket_size=BUCKET) for bits in (8, 4)]
    rows = [
        train("base 8 bits, gathered twice", steps, rank, lambda model: twice[0]),
        train("base 4 bits, gathered twice", steps, rank, lambda model: twice[1]),
        train("peft.wire", steps, rank, lambda model: peft.wire(model, bucket_size=BUCKET)),
    ]
    stock = train("stock FSDP2, fp32", steps, rank, None)
    return [Row(**(asdict(stock) | {"gathered": rows[0].fp32})), *rows]


def train(name: str, steps: int, rank: int, wire: Any) -> Row:
    """Train one LoRA; ``wire`` makes its config of the model, or is None for stock FSDP2."""
    model = lora(rank)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    handle = None if wire is None else qsdp.install(model, wire(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for step in range(steps):
        tokens = batch(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    counts: dict[str, int] = {} if handle is None else handle.traffic.snapshot()
    return Row(
        name=name,
        gathered=counts.get("gather_sent_bytes", 0),
        reduced=counts.get("reduce_sent_bytes"),
        fp32=counts.get("gather_fp32_bytes", 0),
        loss=float(mean) / dist.get_world_size(),
    )


def lora(rank: int) -> Any:
    """A Llama of two layers with LoRA on two of its projections, the same on every rank."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes, **heads)
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(AutoModelForCausalLM.from_config(config), settings)


def batch(step: int) -> Tensor:
    """This rank's sequences, which count upwards."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    start = torch.randint(VOCAB, (BATCH_SIZE, 1), generator=generator)
    return (start + torch.arange(CONTEXT)) % VOCAB


def table(rows: list[Row], steps: int) -> str:
    """The rows for a reader."""
    lines = [f"{steps} steps of LoRA; kB that rank 0 has sent in them"]
    lines.append(f"{'':30}{'gathers':>10}{'reduces':>10}{'last loss':>12}")
    for row in rows:
        reduced = "" if row.reduced is None else f"{row.reduced / 1e3:.1f}"
        lines.append(f"{row.name:30}{row.gathered / 1e3:10.1f}{reduced:>10}{row.loss:12.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
