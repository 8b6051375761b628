"""One rank does something while the others do something else.

All of them raise one sentence at the same call; that no collective is left half done, the default
group shows afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import qsdp
from qsdp.common.collective_errors import CollectiveError
from tests_distributed.support.helpers import make_batch, make_model, shard

UP = "blocks.0.mlp.up.weight"
DOWN = "blocks.0.mlp.down.weight"
ONCE = {"gather": "once"}


class Stage:
    """What one rank has at one point: a sharded model, and the wire if the point has a config."""

    def __init__(self, point: Point, rank: int, odd: int) -> None:
        self.rank, self.odd = rank, odd
        self.model: Any = shard(make_model(**{"num_layers": 1, **point.model}))
        self.batch = make_batch(self.model, 0)
        self.handle: Any = None
        if point.config is not None:
            self.handle = qsdp.install(self.model, qsdp.QSDPConfig(**point.config))
        self.optimizer: Any = None
        self.folder = Path()

    def parameter(self, name: str) -> Any:
        """The shard of that name: what a forward pass left gathered is freed before."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return self.model.get_parameter(name)

    def forward(self) -> Tensor:
        loss: Tensor = self.model(*self.batch)
        return loss

    def train(self) -> Tensor:
        """One forward and backward pass."""
        loss = self.forward()
        torch.autograd.backward(loss)
        return loss.detach()

    def masks(self, *names: str) -> dict[nn.Parameter, Tensor]:
        """Masks that keep everything."""
        chosen = [self.parameter(name) for name in names or (UP,)]
        return {p: torch.ones_like(p.to_local(), dtype=torch.bool) for p in chosen}


Act = Callable[[Stage], object]
Says = Callable[[int, int], str]
"""Of a rank and the odd one, a pattern of what the rank says, without its full stop."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Something in which one rank differs."""

    there: Act
    """What the odd rank does."""
    elsewhere: Act
    """What the others do meanwhile."""
    says: Says
    before: Act = lambda stage: None
    """What all do before that."""
    config: Mapping[str, Any] | None = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


def differs(call: str, fact: str, there: str, elsewhere: str) -> Says:
    """All are at ``call``, but ``fact`` is another one on the odd rank (both patterns)."""

    def says(rank: int, odd: int) -> str:
        one, first = (there, elsewhere) if odd else (elsewhere, there)
        return (
            f"rank {odd or 1} is at {re.escape(call)} with {fact} {one}, but rank 0 with {first}: "
            "do the same on every rank"
        )

    return says


def apart(there: str, elsewhere: str) -> Says:
    """The odd rank is at another call."""

    def says(rank: int, odd: int) -> str:
        one, first = map(re.escape, (there, elsewhere) if odd else (elsewhere, there))
        return (
            f"rank {odd or 1} is at {one} while rank 0 is at {first}: make the same calls on every "
            "rank, in the same order"
        )

    return says


def mistaken(call: str, mistake: str) -> Says:
    """The odd rank says what its mistake is (a pattern), the others whose it is and where."""

    def says(rank: int, odd: int) -> str:
        if rank == odd:
            return mistake
        return f"rank {odd} cannot do what the others do at {re.escape(call)}: {mistake}"

    return says


def installs(what: str, there: str, elsewhere: str) -> Says:
    """``install`` says what differs."""

    def says(rank: int, odd: int) -> str:
        one, first = (there, elsewhere) if odd else (elsewhere, there)
        ends = "give every rank the same config and meshes|build and shard the same model on .*"
        return f"rank {odd or 1} {what} {one} but rank 0 (with|has it) {first}: ({ends})"

    return says


def cannot_install(mistake: str) -> Says:
    """As ``mistaken``, of ``install``."""

    def says(rank: int, odd: int) -> str:
        if rank == odd:
            return mistake
        return f"rank {odd} cannot install qsdp \\({mistake}\\): give every rank the same model .*"

    return says


def both(pattern: str) -> Says:
    """All ranks say the same; ``{odd}`` is the odd rank."""
    return lambda rank, odd: pattern.format(odd=odd)


FORWARD, BACKWARD = "a forward pass", "a backward pass"

SUPPORT = "handle.set_support"


def forward(stage: Stage) -> None:
    stage.forward()


def train(stage: Stage) -> None:
    stage.train()


def in_no_grad(stage: Stage) -> None:
    with torch.no_grad():
        stage.forward()


def in_no_grad_and_train(stage: Stage) -> None:
    in_no_grad(stage)
    stage.train()


def set_masks(*names: str, **options: Any) -> Act:
    return lambda stage: stage.handle.set_support(stage.masks(*names), **options)


def set_pruned(stage: Stage) -> None:
    """Prune the first row of every rank's shard."""
    (parameter, mask), *_ = stage.masks(UP).items()
    mask[:1] = False
    with torch.no_grad():
        parameter.to_local()[:1] = 0
    stage.handle.set_support({parameter: mask})


def load_state(stage: Stage, **changes: Any) -> None:
    state = stage.handle._wire.clock.state_dict() | {"request": {}, "bits": {}, "levels": []}
    stage.handle.load_state_dict(state | changes)


def load_other_bits(stage: Stage) -> None:
    state, rows = stage.handle.state_dict(), stage.handle.report().rows
    bits = {row.name: [3, 3] for row in rows if "bits" in row.weight}
    shapes = {row.name: list(row.shape) for row in rows}
    stage.handle.load_state_dict(state | {"parameters": shapes, "bits": bits})


def made(name: str, base: Any = torch.optim.AdamW, lr: float = 0.1, **options: Any) -> Act:
    """Make that optimizer over ``base``."""

    def act(stage: Stage) -> None:
        parameters = list(stage.model.parameters())
        stage.optimizer = getattr(qsdp, name)(stage.model, base(parameters, lr=lr), **options)

    return act


def say_at_each(points: Mapping[str, Point], odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    odd %= dist.get_world_size()
    return {name: say(point, odd) for name, point in points.items()}


def assert_said(points: Mapping[str, Point], everyone: list[dict[str, str]], odd: int) -> None:
    """Every rank said at each point what is to be said of it."""
    for name, point in points.items():
        for rank, said in enumerate(each[name] for each in everyone):
            told = point.says(rank, odd % len(everyone))
            assert re.fullmatch(rf"({told})\.", said), f"{name}: {said}"


def say(point: Point, odd: int, kind: type[Stage] = Stage) -> str:
    rank = dist.get_rank()
    stage = kind(point, rank, odd)
    point.before(stage)
    said = "nothing"
    try:
        (point.there if rank == odd else point.elsewhere)(stage)
    except (RuntimeError, ValueError) as error:
        said = f"a lost rank: {error}" if isinstance(error, CollectiveError) else str(error)
    # All have left the same collectives, and none is half done.
    present = torch.ones(())
    dist.all_reduce(present)
    assert present == dist.get_world_size()
    return said
