"""What a step costs beside its collectives grows with a model's groups and parameters.

It does not grow with a product of their numbers: calls of qsdp's functions are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qsdp
from tests_distributed.support.helpers import all_ranks
from tests_distributed.support.running import Run, selection

PACKAGE = str(Path(qsdp.__file__).parent)
WIDTH = 4
GATHERS = {"gathered once": "once", "changes gathered": "delta"}
WAYS = ["gathered twice", *GATHERS, "no root", "no root, blocks in parts", "local losses"]


class Adapted(nn.Module):
    """A frozen layer with a trained one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 1, bias=False)
        self.up = nn.Linear(1, WIDTH, bias=False)

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = torch.tanh(self.base(x_BC) + self.up(self.down(x_BC)))
        return y_BC


class Counter:
    """Counts the calls of qsdp's functions, properties and generators in this thread."""

    def __init__(self) -> None:
        self.calls = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        if dist.get_rank() == 0:  # the others do the same
            sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        self.calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)


def _counts(way: str, num_blocks: int) -> list[int]:
    """Calls in the first step and in the third one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted() for _ in range(num_blocks)))
    parts = [part for block in model for part in (block.base, block)]
    wholes = {"no root": [*model], "local losses": [*model], "no root, blocks in parts": parts}
    modules = wholes.get(way, [*model, model])
    for module in modules:
        fully_shard(module, mesh=all_ranks())
    qsdp.install(model, qsdp.QSDPConfig(gather=GATHERS.get(way, "twice")))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in trained]
    found = []
    for _ in range(3):
        counter = Counter()
        with counter.counting():
            for part in model if way == "local losses" else [model]:
                part(torch.randn(2, WIDTH)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append(counter.calls)
    return [found[0], found[2]]


@selection("way", [(way,) for way in WAYS if way != "no root"], WAYS)
def test_calls_grow_with_the_number_of_groups(run: Run, way: str) -> None:
    few, more, many = (run(2, _counts, way, num_blocks)[0] for num_blocks in (4, 8, 16))
    for one, two, four in zip(few, more, many, strict=True):
        assert 0 < four - two < 2.1 * (two - one)
