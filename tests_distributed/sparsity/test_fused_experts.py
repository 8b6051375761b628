"""Experts that are one 3-D parameter a layer are pruned under fully_shard as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qsdp
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.helpers import all_ranks, full_state
from tests_distributed.support.running import Run

STEPS = 8
PHASES = qsdp.ACDCSchedule(steps=STEPS, warmup=2, phase=2, last_dense=1, last_sparse=2)
EXACT = {"weight_bits": 32, "grad_bits": 32}


class Experts(nn.Module):
    """All of a layer's, in two parameters [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 24, 16) * 0.1)
        self.down = nn.Parameter(torch.randn(5, 16, 24) * 0.1)

    def forward(self, x_BC: Tensor) -> Tensor:
        x_EBF = F.gelu(torch.einsum("bc,efc->ebf", x_BC, self.up))
        return torch.einsum("ebf,ecf->bc", x_EBF, self.down) / 5


class Layer(nn.Module):
    """A linear layer, then the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.experts = nn.Linear(16, 16), Experts()

    def forward(self, x_BC: Tensor) -> Tensor:
        x_BC = x_BC + self.attention(x_BC)
        x_BC = x_BC + self.experts(x_BC)
        return x_BC


class Fused(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(16, 16)

    def forward(self, x_BC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BC = block(x_BC)
        y_BC: Tensor = self.head(x_BC)
        return y_BC


def _make() -> Fused:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Fused()


def _optimizer(method: str, model: nn.Module) -> Any:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if method == "ACDC":
        return qsdp.ACDC(model, base, schedule=PHASES, target=0.9)
    return qsdp.CrAM(model, base, sparsity="0.5+4bit")


def _zeros(model: nn.Module) -> int:
    """Of this rank's part of the blocks' weights."""
    parameters = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim > 1]
    return sum(int((local_shard(p).values == 0).sum()) for p in parameters)


def _train(method: str, model: nn.Module, optimizer: Any, ranks: list[int]) -> list[int]:
    """How many weights were zero in each pass."""
    zeros = []
    for step in range(STEPS if method == "ACDC" else 3):

        def closure(step: int = step) -> Tensor:
            zeros.append(_zeros(model))
            optimizer.zero_grad()
            total = torch.zeros(())
            for rank in ranks:
                generator = torch.Generator().manual_seed(100 * step + rank)
                loss = model(torch.randn(4, 16, generator=generator)).square().mean() / len(ranks)
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(closure)
    return [*zeros, _zeros(model)]


def _sharded(method: str, config: dict[str, Any]) -> tuple[list[int], dict[str, Tensor], int]:
    model: Any = _make()
    for block in model.blocks:
        fully_shard(block, mesh=all_ranks())
    fully_shard(model, mesh=all_ranks())
    handle = qsdp.install(model, qsdp.QSDPConfig(**config))
    optimizer = _optimizer(method, model)
    optimizer.share_support(handle.set_support)
    zeros = _train(method, model, optimizer, [dist.get_rank()])
    return zeros, full_state(model), optimizer.skipped_steps


@pytest.mark.parametrize("config", [EXACT, {"bucket_size": 64}], ids=["exact", "8 bits"])
@pytest.mark.parametrize("method", ["ACDC", "CrAM"])
def test_fused_experts_are_pruned_as_in_one_process(
    run: Run, method: str, config: dict[str, Any]
) -> None:
    plain = _make()
    expected = _train(method, plain, _optimizer(method, plain), [0, 1])
    total = sum(p.numel() for p in plain.get_submodule("blocks").parameters() if p.ndim > 1)
    results = run(2, _sharded, method, config)
    zeros = [sum(counts) for counts in zip(*(result[0] for result in results), strict=True)]
    if method == "ACDC":
        compressed = [*filter(PHASES.is_compressed, range(STEPS)), STEPS]
        assert all(zeros[step] == round(0.9 * total) for step in compressed)
    else:  # of the weights that stay, 4 bits may round some to zero
        assert all(count >= total / 2 for count in zeros[1::2])
    for _, state, skipped in results:
        assert skipped == 0
        for name, value in plain.named_parameters():
            difference = (state[name] - value).detach().abs()
            if config == EXACT:
                assert difference.max() < 1e-6, name
                assert zeros == expected
            else:
                assert difference.mean() < 0.01, name
