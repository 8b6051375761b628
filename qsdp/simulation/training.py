"""The training of N ranks in one process, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsdp.compat.parameter_names import named_buffers, named_parameters
from qsdp.simulation.kept_weights import check_kept_masks
from qsdp.simulation.reduction import Reduction
from qsdp.simulation.simulated_passes import SimulatedPasses, casting_inputs, noting_groups
from qsdp.simulation.simulated_wire import SimulatedWire
from qsdp.simulation.volume import SimulatedVolume, count_bytes

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Simulation:
    """The simulated training: shards, optimizers, and what happens between. Made by ``simulate``.

    ``shards[rank]`` are the parameters of a rank of the shard axis by name, ``optimizers[rank]``
    its optimizer (set learning rates on all of them), ``clock`` the step in the random keys: it
    counts reduces, and is advanced when the next pass begins.
    """

    def __init__(
        self,
        model: nn.Module,
        wire: SimulatedWire,
        make_optimizer: MakeOptimizer,
        loss: Callable[[Any], Tensor] | None,
    ) -> None:
        self.clock = 0
        self._model, self._wire = model, wire
        self._passes = SimulatedPasses(model, loss)
        self._has_reduced = False
        named = named_parameters(model)
        rows = {name: wire.sharding.cut(name, p.detach()) for name, p in named.items()}
        self._shapes = {name: p.shape for name, p in named.items()}
        self.shards = [
            {
                name: nn.Parameter(cut[rank].clone(), named[name].requires_grad)
                for name, cut in rows.items()
            }
            for rank in range(wire.world.world_size)
        ]
        self.optimizers = [make_optimizer(list(shards.values())) for shards in self.shards]

    def step(
        self,
        batches: Sequence[Sequence[Any]],
        *,
        max_norm: float | None = None,
        sync_every: bool = False,
    ) -> float:
        """Forward and backward of every rank, reduce, clip and update.

        Args:
            batches: ``batches[micro][rank]``, by micro-batch and global rank: the positional
                arguments of the model, or a mapping of its keyword arguments.
            max_norm: Clip gradients to this norm, as ``qsdp.clip_grad_norm_`` does.
            sync_every: Reduce after each micro-batch, not only after the last.

        Returns:
            The mean loss over micro-batches and ranks.

        Raises:
            ValueError: The batches are not those of all ranks, ``max_norm`` is not above 0, or the
                loss is not a scalar.
            RuntimeError: Ranks have gradients for different parameters, where FSDP2 would fail.
        """
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}: choose a number above 0.")
        losses = [loss for micro in self.pass_(batches, sync_every=sync_every) for loss in micro]
        if max_norm is not None:
            self.clip(max_norm)
        self.update()
        return sum(losses) / len(losses)

    def pass_(
        self, batches: Sequence[Sequence[Any]], *, sync_every: bool = False
    ) -> list[list[float]]:
        """The first part of ``step``: add the reduced gradients to the shards' ``.grad``.

        Each loss is multiplied by 1 / (number of micro-batches).

        Returns:
            The losses before that, by micro-batch and global rank.
        """
        num_ranks = self._wire.world.num_ranks
        if not batches or any(len(per_rank) != num_ranks for per_rank in batches):
            given = [len(per_rank) for per_rank in batches]
            raise ValueError(
                f"batches holds {given} batches of its micro-batches: give at least one "
                f"micro-batch, and in each one batch for every one of {num_ranks} ranks."
            )
        scale = 1 / len(batches)
        windows = [[micro] for micro in batches] if sync_every else [batches]
        dtype = self._wire.world.param_dtype
        with casting_inputs(self._wire.numbers.modules, dtype), torch.enable_grad():
            return [losses for window in windows for losses in self._pass_window(window, scale)]

    def clip(self, max_norm: float) -> float:
        """Clip by the norm of per-rank fp64 sums added in rank order; returns the norm."""
        norm = math.sqrt(
            sum(
                sum(float(grad.double().square().sum()) for grad in _grads(shards).values())
                for shards in self.shards
            )
        )
        coefficient = min(1.0, max_norm / (norm + 1e-6))
        for shards in self.shards:
            for grad in _grads(shards).values():
                grad.mul_(coefficient)
        return norm

    def update(self) -> None:
        """Every rank's optimizer step; gradients are dropped."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, weights travel fresh and kept grids stay as they are, as in ``Handle.aside()``.

        For passes with weights that are other ones for a while. It matters to ``gather="delta"``
        alone.
        """
        before, self._wire.is_aside = self._wire.is_aside, True
        try:
            yield
        finally:
            self._wire.is_aside = before

    def weights(self) -> dict[str, Tensor]:
        """Every parameter as all ranks compute with it in this step of the clock.

        They are decoded, in the parameter dtype: for validation as the run would see it without
        ``handle.exact()``. With ``gather="delta"`` they are those of the next step once gradients
        were reduced, and grids are drawn for these if they have to be, but for ``aside()``.
        """
        step = self.clock + (self._has_reduced and self._wire.grids is not None)
        self._wire.begin_gather(step)
        weights = {
            name: self._wire.sharding.join(
                name,
                [
                    self._wire.weight(name, shards[name], rank, step)
                    for rank, shards in enumerate(self.shards)
                ],
            )
            for name in self.shards[0]
        }
        self._wire.end_gather(step)
        return weights

    def state(self) -> dict[str, Tensor]:
        """Every whole parameter, exact, tied ones once: copies."""
        return {
            name: self._wire.sharding.join(name, [shards[name].detach() for shards in self.shards])
            for name in self.shards[0]
        }

    def grads(self) -> dict[str, Tensor]:
        """Every whole gradient that the shards have now: copies."""
        return {
            name: self._wire.sharding.join(name, [_grads(shards)[name] for shards in self.shards])
            for name in _grads(self.shards[0])
        }

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the exact parameters, and the buffers, into ``model``: to evaluate or save it.

        Raises ValueError unless it has the names and shapes of the simulated one.
        """
        sources = self.state() | self._passes.buffers
        targets = named_parameters(model) | named_buffers(model)
        for name in sorted(sources.keys() | targets.keys()):
            ours, theirs = (
                "none" if name not in found else str(tuple(found[name].shape))
                for found in (sources, targets)
            )
            if ours != theirs:
                raise ValueError(
                    f"{name} has the shape {theirs} in this {type(model).__name__} and {ours} in "
                    "the simulation: give a plain model of the same architecture."
                )
        for name, value in sources.items():
            targets[name].copy_(value)

    def set_support(self, masks: Mapping[str, Tensor] | None, *, with_grads: bool = True) -> None:
        """Let only the weights that ``masks`` keep travel, as ``Handle.set_support`` does.

        Args:
            masks: A bool mask of each whole parameter, by name; all other weights must be +0.0.
            with_grads: False sends all gradients.

        Raises:
            ValueError: A mask is no bool tensor of a parameter's shape.
        """
        if not masks and not with_grads:
            raise ValueError("with_grads is False without masks: give masks, or leave it out.")
        check_kept_masks(masks or {}, self._shapes)
        self._wire.set_support(masks or {}, with_grads=with_grads)

    def wire_bytes(
        self,
        *,
        rank: int = 0,
        micro_batches: int = 1,
        reshard_after_forward: bool | None = None,
    ) -> SimulatedVolume:
        """What a global rank sends in a step after the warm-up, by arithmetic on layouts.

        All trained parameters are taken to get gradients. Not counted are weights that are sent
        once for all steps (``gather="once"``, frozen), and what FSDP2 sends by itself: the
        all-reduce of native HSDP. With ``gather="delta"`` bytes depend on the weights: gathers are
        those of the last step that has sent changes, all of which its first one is taken to bring.

        Args:
            rank: The sender; all ranks send the same sizes, to the same node or to others.
            micro_batches: How many are accumulated before one reduce: each gathers anew.
            reshard_after_forward: As given to ``fully_shard``: None gathers the root's group once
                and all others twice, False gathers all once.

        Raises:
            ValueError: An argument is not as above, a support is set, or no changes were sent yet.
        """
        if self._wire.kept_weights:
            raise ValueError(
                "wire_bytes is for whole weights, but a support is set: call it before set_support."
            )
        if type(rank) is not int or not 0 <= rank < self._wire.world.num_ranks:
            raise ValueError(f"rank is {rank!r}: choose 0 to {self._wire.world.num_ranks - 1}.")
        if type(micro_batches) is not int or micro_batches < 1:
            raise ValueError(
                f"micro_batches is {micro_batches!r}: choose a whole number from 1 on."
            )
        return count_bytes(
            self._wire,
            self.shards[0],
            num_parameters=sum(p.numel() for p in self._model.parameters()),
            rank=rank,
            micro_batches=micro_batches,
            reshard_after_forward=reshard_after_forward,
        )

    def _pass_window(self, window: Sequence[Sequence[Any]], scale: float) -> list[list[float]]:
        """Take the micro-batches up to one reduce.

        Ranks come one after the other, so that only one rank's gradients are held at a time.
        """
        if self._has_reduced:
            self.clock, self._has_reduced = self.clock + 1, False
            self._wire.advance(self.clock, self.shards)
        rewind = self._wire.rewind_point()
        weights = self.weights()
        trained = {name for name, shard in self.shards[0].items() if shard.requires_grad}
        reduction = Reduction(self._wire, self.clock)
        losses: list[list[float]] = [[] for _ in window]
        looked_at = self._wire.numbers.modules if self._wire.grids is not None else {}
        with noting_groups(looked_at) as gathered:
            for rank in range(self._wire.world.num_ranks):
                kept: dict[str, Tensor] = {}
                for micro, per_rank in enumerate(window):
                    loss, grads = self._passes.loss_and_grads(
                        weights, trained, per_rank[rank], scale
                    )
                    losses[micro].append(loss)
                    for name, grad in grads.items():
                        if name in kept:
                            kept[name] += grad  # rounded once, as FSDP2 adds it
                        else:
                            kept[name] = grad.to(self._wire.world.reduce_dtype)
                reduction.add(kept)
        rewind(gathered)
        for name, rank, grad in reduction.results():
            shard = self.shards[rank][name]
            grad = grad.to(shard.dtype)
            shard.grad = grad if shard.grad is None else shard.grad + grad
        self._has_reduced = True
        return losses


def _grads(shards: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in shards.items() if p.grad is not None}
