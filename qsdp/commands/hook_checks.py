"""Whether collectives and hooks keep their promises, here and now: what ``qsdp selfcheck`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from qsdp.comm import transport
from qsdp.commands.codec_checks import Failed, check_changes, check_codec
from qsdp.common.printing import printable
from qsdp.common.user_errors import quoted
from qsdp.models.language_model import LanguageModel
from qsdp.models.registry import DEFAULT_PRESET, family_of
from qsdp.ops import native
from qsdp.train.world import World

STEPS = 10


def run_all_checks(world: World) -> int:
    """Run every check, those of the codec too, and print their table on rank 0.

    Returns 0 if all hold on every rank, 1 if not.
    """
    native.say_no_more()
    checks: list[tuple[str, Callable[[World], str]]] = [
        ("codec: this device's bytes are the specification's", check_codec),
        ("codec: and so are its changes to kept codes", check_changes),
        ("all-gather of payloads", check_all_gather),
        ("all-to-all of uneven payloads", check_all_to_all),
        ("hooks: every rank computes with the same weights", check_same_weights),
        ("hooks: 32 bits train as stock FSDP2", check_full_precision),
        ("hooks: 8 bits train as 32 bits do", check_eight_bits),
        ("hooks: every rank keeps the same codes of weights", check_kept_codes),
        ("hooks: changed codes alone train as 32 bits do", check_changed_codes),
    ]
    table = Table(title=f"{world.size} ranks, {world.backend}, {world.device.type}")
    for column in ("check", "result", "seconds", "what was seen on rank 0, or went wrong"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    all_hold = True
    for name, check in checks:
        start = time.perf_counter()
        try:
            seen, holds = check(world), True
        except (Failed, RuntimeError, ValueError) as error:
            seen, holds = quoted(error), False
        outcomes: list[Any] = [None] * world.size
        dist.all_gather_object(outcomes, (holds, seen))
        bad = [f"rank {rank}: {said}" for rank, (fine, said) in enumerate(outcomes) if not fine]
        all_hold &= not bad
        result = "[red]failed" if bad else "[green]holds"
        seconds = f"{time.perf_counter() - start:.1f}"
        # Errors of torch have paths in brackets, which would be markup.
        told = Text(printable("; ".join(bad[:3]) if bad else seen))
        table.add_row(name, result, seconds, told)
    if world.is_main:
        console = Console()
        console.print(table)
        if world.size == 1:
            console.print(
                "one rank: FSDP2 bypasses the hooks; to prove them, and the collectives, run "
                "torchrun --standalone --nproc-per-node 2 -m qsdp selfcheck",
                soft_wrap=True,
            )
    return 0 if all_hold else 1


def check_all_gather(world: World) -> str:
    """Every rank's bytes arrive at every rank, in order."""
    num_bytes = 1 << 24
    own = torch.full((num_bytes,), world.rank % 251, dtype=torch.uint8, device=world.device)
    output = torch.empty(world.size * num_bytes, dtype=torch.uint8, device=world.device)
    group = world.mesh.get_group()
    seconds = _seconds_of(lambda: transport.start_all_gather(output, own, group).wait(), world)
    for rank, found in enumerate(output.split(num_bytes)):
        if not bool((found == rank % 251).all()):
            raise Failed(f"rank {rank}'s bytes arrived changed.")
    sent = (world.size - 1) * num_bytes
    return f"{sent / seconds / 1e9:.2f} GB/s sent a rank"


def check_all_to_all(world: World) -> str:
    """Rows of different sizes, nothing to oneself, as the reduce sends them."""
    sizes = [(0 if peer == world.rank else 1000 + world.rank) for peer in range(world.size)]
    coming = [(0 if peer == world.rank else 1000 + peer) for peer in range(world.size)]
    sent = torch.full((sum(sizes),), world.rank % 251, dtype=torch.uint8, device=world.device)
    output = torch.empty(sum(coming), dtype=torch.uint8, device=world.device)
    transport.start_all_to_all(output, sent, coming, sizes, world.mesh.get_group()).wait()
    for rank, found in enumerate(output.split(coming)):
        if not bool((found == rank % 251).all()):
            raise Failed(f"rank {rank}'s bytes arrived changed.")
    return f"{sum(coming)} bytes"


def check_same_weights(world: World) -> str:
    """The gathered weights of one forward pass have one hash on all ranks."""
    model, handle = _make_model(world, _config(4))
    sums = _fingerprints_of(model)
    model(*_make_batch(world, 0))
    num = _check_equal(world, torch.cat(sums))
    return f"{num} tensors, {_gathered_bytes(handle)} bytes sent"


def check_kept_codes(world: World) -> str:
    """With changes alone sent, the weights of some steps have one hash on all ranks."""
    model, handle = _make_model(world, _config(4, "delta"))
    sums = _fingerprints_of(model)
    sent: list[int] = []
    for _ in _train(world, model, 4):
        sent.append(_gathered_bytes(handle) - sum(sent))
    _check_equal(world, torch.cat(sums))
    num_changed = handle.traffic.snapshot().get("changed_codes", 0)
    if world.size > 1 and not num_changed:
        raise Failed("no code has changed in training.")
    return f"{', '.join(map(str, sent))} bytes sent a step, {num_changed} codes changed"


def _fingerprints_of(model: LanguageModel) -> list[Tensor]:
    """A list that takes, whenever a block runs, what its gathered weights are known by."""
    sums: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, _: sums.append(
                torch.stack([_fingerprint(p.detach()) for p in block.parameters()])
            )
        )
    return sums


def _check_equal(world: World, own: Tensor) -> int:
    """Raise Failed where a rank has other numbers. Returns how many there are."""
    others = torch.empty(world.size * own.numel(), dtype=own.dtype, device=own.device)
    transport.start_all_gather(others, own, world.mesh.get_group()).wait()
    for rank, found in enumerate(others.split(own.numel())):
        if not torch.equal(found, own):
            raise Failed(f"rank {rank} computes with other weights.")
    return own.numel()


def _gathered_bytes(handle: qsdp.Handle) -> int:
    return handle.traffic.snapshot()["gather_sent_bytes"]


def check_full_precision(world: World) -> str:
    """Losses through qsdp's own collectives at 32 bits are stock FSDP2's to 1e-4."""
    return _compare_losses(world, None, _config(32), 1e-4)


def check_eight_bits(world: World) -> str:
    """Losses at 8 bits follow those at 32 bits to 0.02 nats."""
    return _compare_losses(world, _config(32), _config(8), 0.02)


def check_changed_codes(world: World) -> str:
    """The same where changes of weights alone are sent."""
    return _compare_losses(world, _config(32), _config(8, "delta"), 0.02)


def _config(bits: int, gather: str = "twice") -> qsdp.QSDPConfig:
    return qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits, gather=gather)


def _compare_losses(
    world: World, one: qsdp.QSDPConfig | None, other: qsdp.QSDPConfig, tolerance: float
) -> str:
    first, second = (
        list(_train(world, _make_model(world, config)[0], STEPS)) for config in (one, other)
    )
    gap = max(abs(a - b) for a, b in zip(first, second, strict=True))
    if not gap <= tolerance:
        raise Failed(f"losses differ by {gap:.3g}, more than {tolerance}.")
    return f"losses differ by at most {gap:.1e} in {STEPS} steps"


def _train(world: World, model: LanguageModel, steps: int) -> Iterator[float]:
    """Train, and give the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        _, loss = model(*_make_batch(world, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield world.sum(loss)[0] / world.size


def _make_model(world: World, config: qsdp.QSDPConfig | None) -> tuple[LanguageModel, Any]:
    family = family_of(DEFAULT_PRESET)
    model = family.build(family.size_of_preset(DEFAULT_PRESET, 101)).to(world.device)
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    for module in (*model.blocks, model):
        # As qsdp has it: not every gloo averages.
        cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)
    family.init_weights(model, 0)
    return model, None if config is None else qsdp.install(model, config)


def _make_batch(world: World, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * step + world.rank)
    return list(torch.randint(101, (2, 4, 64), generator=generator).to(world.device))


def _fingerprint(values: Tensor) -> Tensor:
    """An int64 that depends on every bit and its place."""
    bits = values.contiguous().view(torch.int32).flatten().long()
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()


def _seconds_of(call: Callable[[], object], world: World) -> float:
    call()  # the first call opens connections
    _synchronize(world)
    start = time.perf_counter()
    call()
    _synchronize(world)
    return time.perf_counter() - start


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
