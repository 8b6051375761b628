"""A play: what is done to a training, told once, and done to real processes and to a simulation.

The two end with equal records, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from tests_distributed.support.delta import decoded
from tests_distributed.support.helpers import Toy, full_grads, full_state, make_batch, make_model
from tests_distributed.support.running import Run
from tests_distributed.support.trainings import (
    Case,
    assert_equal,
    installed,
    make_optimizer,
    masks_of_blocks,
    own_part,
    simulation_of,
)

Cut = Callable[[Tensor], Tensor]
"""Takes the part of a shard out of a whole tensor."""
Masks = dict[str, Tensor]


class Side(ABC):
    """One of the two sides: ``case`` as it is trained, and a record of what was seen.

    ``model`` says names and shapes alone.
    """

    def __init__(self, case: Case, seed: int, model: Toy) -> None:
        self.case, self.seed, self._toy = case, seed, model

    @abstractmethod
    def parts(self) -> Iterable[tuple[str, Tensor, Cut]]:
        """All shards that this side has, to write them: by the parameter's name."""

    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """Inside, weights travel fresh."""

    @abstractmethod
    def set_support(self, masks: Masks | None, *, with_grads: bool = True) -> None:
        """Let what whole ``masks`` keep travel alone."""

    @abstractmethod
    def take_pass(self, number: int, *, resting: Iterable[int] = ()) -> None:
        """Forward and backward, of batches that follow from ``number``; losses are recorded.

        Blocks that are ``resting`` are left out, and not gathered.
        """

    @abstractmethod
    def look(self) -> None:
        """Record the weights as gathers bring them now, without a pass."""

    @abstractmethod
    def validate(self, number: int) -> None:
        """Record the losses of a forward pass without gradients."""

    @abstractmethod
    def update(self) -> None:
        """Record the gradients, and take the optimizer's step."""

    def masks(self, number: int, *, part: str = "") -> Masks:
        """Masks of blocks' matrices that have ``part`` in their names; others with each number."""
        found = masks_of_blocks(self.seed + number, self._toy)
        return {name: mask for name, mask in found if part in name}

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Put zeros where ``masks`` keep nothing."""
        for name, part, cut in self.parts():
            if name in masks:
                part.masked_fill_(~cut(masks[name]), 0)

    @torch.no_grad()
    def move(self, number: int, *, only: str = "") -> None:
        """Add what follows from ``number`` to all weights that have ``only`` in their names."""
        generator = torch.Generator().manual_seed(self.seed + number)
        moves = {
            name: torch.randn(p.shape, generator=generator).mul_(0.02)
            for name, p in self._toy.named_parameters()
        }
        for name, part, cut in self.parts():
            if only in name:
                part.add_(cut(moves[name]))

    def copy(self) -> list[Tensor]:
        """All weights as they are now."""
        return [part.detach().clone() for _, part, _ in self.parts()]

    @torch.no_grad()
    def put_back(self, copies: list[Tensor]) -> None:
        """Let all weights be those of then."""
        for (_, part, _), was in zip(self.parts(), copies, strict=True):
            part.copy_(was)


Play = Callable[[Side], None]
"""A function at the top level of a module."""


def assert_both_sides_see_the_same(run: Run, case: Case, play: Play, seed: int) -> None:
    """Losses, gradients and weights that the play records, and the weights at its end."""
    (expected,) = run(1, _played_in_one, case, play, seed)
    for rank, record in enumerate(run(case.ranks * case.replicas, _played, case, play, seed)):
        assert len(record) == len(expected)
        for i, (found, simulated) in enumerate(zip(record, expected, strict=True)):
            where = f"record {i}, rank {rank}, seed {seed}"
            if isinstance(found, float):
                assert found == simulated[rank], where
            else:
                assert_equal(found, simulated, where)


class RealSide(Side):
    """One rank of the real thing."""

    def __init__(self, case: Case, seed: int) -> None:
        self._model, self._handle = installed(case, seed)
        super().__init__(case, seed, make_model(seed, **case.options))
        self._optimizer = make_optimizer(case, self._model.parameters())
        self.record: list[Any] = []

    def parts(self) -> Iterable[tuple[str, Tensor, Cut]]:
        for name, p in self._model.named_parameters():
            yield name, p.to_local(), lambda whole, p=p: own_part(whole, p)  # type: ignore[misc]

    def aside(self) -> AbstractContextManager[None]:
        return self._handle.aside()

    def set_support(self, masks: Masks | None, *, with_grads: bool = True) -> None:
        parameters = dict(self._model.named_parameters())
        own = {parameters[n]: own_part(mask, parameters[n]) for n, mask in (masks or {}).items()}
        self._handle.set_support(own, with_grads=with_grads)

    def take_pass(self, number: int, *, resting: Iterable[int] = ()) -> None:
        self._model.resting = frozenset(resting)
        loss = self._model(*make_batch(self._model, self.seed % 1000 * 100 + number))
        torch.autograd.backward(loss)
        self._model.resting = frozenset()
        self.record.append(float(loss.detach()))

    def look(self) -> None:
        self.record.append(decoded(self._model))

    def validate(self, number: int) -> None:
        with torch.no_grad():
            self.record.append(float(self._model(*make_batch(self._model, self.seed + number))))

    def update(self) -> None:
        self.record.append(full_grads(self._model))
        self._optimizer.step()
        self._optimizer.zero_grad()


class SimulatedSide(Side):
    """All ranks of it in one process; a list of losses, by rank, stands for each of theirs."""

    def __init__(self, case: Case, seed: int) -> None:
        self._simulation = simulation_of(case, seed)
        super().__init__(case, seed, make_model(seed, **case.options))
        self.record: list[Any] = []

    def parts(self) -> Iterable[tuple[str, Tensor, Cut]]:
        cut = self._simulation._wire.sharding.cut
        for rank, shards in enumerate(self._simulation.shards):
            for name, shard in shards.items():
                yield name, shard.data, lambda whole, name=name, rank=rank: cut(name, whole)[rank]  # type: ignore[misc]

    def aside(self) -> AbstractContextManager[None]:
        return self._simulation.aside()

    def set_support(self, masks: Masks | None, *, with_grads: bool = True) -> None:
        self._simulation.set_support(masks, with_grads=with_grads)

    def take_pass(self, number: int, *, resting: Iterable[int] = ()) -> None:
        num_ranks, seed = self.case.ranks * self.case.replicas, self.seed % 1000 * 100 + number
        batches = [[make_batch(self._toy, seed, rank) for rank in range(num_ranks)]]
        model = cast(Toy, self._simulation._model)
        model.resting = frozenset(resting)
        self.record += self._simulation.pass_(batches)
        model.resting = frozenset()

    def look(self) -> None:
        self.record.append(self._simulation.weights())

    def validate(self, number: int) -> None:
        weights, losses = self._simulation.weights(), []
        with torch.no_grad():
            for rank in range(self.case.ranks * self.case.replicas):
                batch = make_batch(self._toy, self.seed + number, rank)
                losses.append(float(functional_call(self._toy, weights, tuple(batch))))
        self.record.append(losses)

    def update(self) -> None:
        self.record.append(self._simulation.grads())
        self._simulation.update()


def _played(case: Case, play: Play, seed: int) -> list[Any]:
    side = RealSide(case, seed)
    play(side)
    return [*side.record, full_state(side._model)]


def _played_in_one(case: Case, play: Play, seed: int) -> list[Any]:
    side = SimulatedSide(case, seed)
    play(side)
    return [*side.record, side._simulation.state()]
