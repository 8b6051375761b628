"""`simulate(model, config, world_size=N, ...)`: the training of N ranks in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from qsdp import compat
from qsdp.common.dtypes import CODEC_DTYPES
from qsdp.config import QSDPConfig
from qsdp.simulation.ranks import Group, World, number
from qsdp.simulation.reference import Reduction, Wire
from qsdp.simulation.volume import WireBytes, count_bytes

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def simulate(
    model: nn.Module,
    config: QSDPConfig | None = None,
    *,
    world_size: int,
    optimizer: MakeOptimizer,
    groups: Sequence[Group] = (),
    ranks_per_node: int | None = None,
    replicas: int = 1,
    quantized_replicas: bool = False,
    param_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    shard_dims: Mapping[str, int] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Simulation:
    """Train as ``world_size`` ranks of FSDP2 with qsdp would, in one process, bit for bit.

    To choose bits before renting a cluster (QSDP, arXiv 2302.02390). A step costs the computation
    of all ranks one after the other; memory holds one set of shards and optimizer states, the
    weights of a step, and the gradients of one rank beside the sums so far.

    The same bits come out under the same conditions as anywhere: the same kernels of torch (device,
    thread count), deterministic operations, no dropout (ranks have generators of their own), and
    with `replicas` above 2 and FSDP2's own all-reduce only up to the order of its sum. All ranks
    share one set of buffers. Optimizers see the shards of one rank: CrAM and whatever else needs
    the whole model is not simulated.

    Args:
        model: The plain model, before `fully_shard`; its weights are where training starts. It is
            not changed.
        config: What `qsdp.install` is given; None takes the defaults.
        world_size: Ranks of the shard axis.
        optimizer: Called once a rank of the shard axis with its shards, in the order of
            `model.parameters()`; returns an optimizer.
        groups: What `fully_shard` is called on, but for the root, which always is: modules, their
            names, or lists of these for one call on several modules. Groups number random keys.
        ranks_per_node: Consecutive ranks on one node, where `config.ranks_per_node` does not say
            it; None is 1.
        replicas: Ranks of the replicate axis (HSDP), of which each has a shard group.
        quantized_replicas: The replicas' all-reduce is that of `install(..., replicate_mesh=...)`.
        param_dtype: Of `MixedPrecisionPolicy`: what gathered parameters are cast to.
        reduce_dtype: The dtype of gradients in the reduce.
        shard_dims: By name, the dimension of those parameters that `shard_placement_fn` does not
            shard along the first.
        loss: Makes a scalar of what the model returns; None: it returns a scalar.

    Returns:
        A `Simulation` before its first step.

    Raises:
        ValueError: an argument is not as above.
    """
    config = QSDPConfig() if config is None else config
    if not isinstance(config, QSDPConfig):
        raise ValueError(f"config is a {type(config).__name__}; give a qsdp.QSDPConfig")
    if ranks_per_node is None:
        ranks_per_node = config.ranks_per_node or 1
    elif config.ranks_per_node not in (None, ranks_per_node):
        raise ValueError(
            f"ranks_per_node is {ranks_per_node}, and that of the config is "
            f"{config.ranks_per_node}; leave one of the two out"
        )
    world = World(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        replicas=replicas,
        quantized_replicas=quantized_replicas,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
    )
    shard_dims = dict(shard_dims or {})
    _check_model(model, world, shard_dims)
    numbers = number(model, groups)
    wire = Wire(model, config, world, numbers, shard_dims)
    return Simulation(model, wire, optimizer, loss)


class Simulation:
    """The ranks' shards and optimizers, and what happens between them. Made by `simulate`.

    `shards[rank]` are the parameters of a rank of the shard axis by name, `optimizers[rank]` its
    optimizer (set learning rates on all of them), `clock` the step in the random keys: it counts
    reduces, and is advanced when the next pass begins.
    """

    def __init__(
        self,
        model: nn.Module,
        wire: Wire,
        make_optimizer: MakeOptimizer,
        loss: Callable[[Any], Tensor] | None,
    ) -> None:
        self.clock = 0
        self._model, self._wire, self._pass = model, wire, _Pass(model, loss)
        self._has_reduced = False
        # A layer that writes its buffers must not write the user's.
        self._buffers = {
            name: buffer.clone() for name, buffer in compat.named_buffers(model).items()
        }
        named = compat.named_parameters(model)
        rows = {name: wire.cut(name, p.detach()) for name, p in named.items()}
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
            max_norm: Clip gradients to this norm, as `qsdp.clip_grad_norm_` does.
            sync_every: Reduce after each micro-batch, not only after the last.

        Returns:
            The mean loss over micro-batches and ranks.

        Raises:
            ValueError: the batches are not those of all ranks, `max_norm` is not above 0, or the
                loss is not a scalar.
            RuntimeError: ranks have gradients for different parameters, where FSDP2 would fail.
        """
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; choose a number above 0")
        losses = [loss for micro in self.pass_(batches, sync_every=sync_every) for loss in micro]
        if max_norm is not None:
            self.clip(max_norm)
        self.update()
        return sum(losses) / len(losses)

    def pass_(
        self, batches: Sequence[Sequence[Any]], *, sync_every: bool = False
    ) -> list[list[float]]:
        """The first part of `step`: add the reduced gradients to the shards' `.grad`.

        Each loss is multiplied by 1 / (number of micro-batches).

        Returns:
            The losses before that, by micro-batch and global rank.
        """
        num_ranks = self._wire.world.num_ranks
        if not batches or any(len(per_rank) != num_ranks for per_rank in batches):
            given = [len(per_rank) for per_rank in batches]
            raise ValueError(
                f"batches holds {given} batches of its micro-batches; give at least one "
                f"micro-batch, and in each one batch for every one of {num_ranks} ranks"
            )
        scale = 1 / len(batches)
        windows = [[micro] for micro in batches] if sync_every else [batches]
        with self._casting_inputs(), torch.enable_grad():
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

    def weights(self) -> dict[str, Tensor]:
        """Every parameter as all ranks compute with it in this step of the clock: decoded, in the
        parameter dtype. For validation as the run would see it without `handle.exact()`."""
        return {
            name: self._wire.join(
                name,
                [
                    self._wire.weight(name, shards[name], rank, self.clock)
                    for rank, shards in enumerate(self.shards)
                ],
            )
            for name in self.shards[0]
        }

    def state(self) -> dict[str, Tensor]:
        """Every whole parameter, exact, tied ones once: copies."""
        return {
            name: self._wire.join(name, [shards[name].detach() for shards in self.shards])
            for name in self.shards[0]
        }

    def grads(self) -> dict[str, Tensor]:
        """Every whole gradient that the shards have now: copies."""
        return {
            name: self._wire.join(name, [_grads(shards)[name] for shards in self.shards])
            for name in _grads(self.shards[0])
        }

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the exact parameters, and the buffers, into a model of the simulated one's names
        and shapes: to evaluate or save it.

        Raises ValueError when it has others.
        """
        sources = self.state() | self._buffers
        targets = compat.named_parameters(model) | compat.named_buffers(model)
        for name in sorted(sources.keys() | targets.keys()):
            ours, theirs = (
                "none" if name not in found else str(tuple(found[name].shape))
                for found in (sources, targets)
            )
            if ours != theirs:
                raise ValueError(
                    f"{name} has the shape {theirs} in this {type(model).__name__} and {ours} in "
                    "the simulation; give a plain model of the same architecture"
                )
        for name, value in sources.items():
            targets[name].copy_(value)

    def set_support(self, masks: Mapping[str, Tensor] | None, *, with_grads: bool = True) -> None:
        """Let only the weights that ``masks`` keep travel, as `Handle.set_support` does.

        Args:
            masks: by name a bool mask of the whole parameter; all other weights must be +0.0.
            with_grads: False sends all gradients.

        Raises ValueError for a mask that is no bool tensor of a parameter's shape.
        """
        if not masks and not with_grads:
            raise ValueError("with_grads is False without masks; give masks, or leave it out")
        for name, mask in (masks or {}).items():
            if name not in self._shapes:
                raise ValueError(
                    f"a mask is given for {name!r}, which is no parameter of the model; give masks "
                    "by the names of state()"
                )
            if type(mask) is not Tensor or mask.dtype != torch.bool:
                raise ValueError(
                    f"the mask of {name} is a {type(mask).__name__} of "
                    f"{getattr(mask, 'dtype', None)}; give a bool tensor of the parameter's shape"
                )
            if mask.shape != self._shapes[name]:
                raise ValueError(
                    f"the mask of {name} has shape {tuple(mask.shape)}, and the parameter "
                    f"{tuple(self._shapes[name])}; give a mask of that shape"
                )
        self._wire.set_support(masks or {}, with_grads=with_grads)

    def wire_bytes(
        self,
        *,
        rank: int = 0,
        micro_batches: int = 1,
        reshard_after_forward: bool | None = None,
    ) -> WireBytes:
        """What a global rank sends in a step after the warm-up, by arithmetic on layouts.

        All trained parameters are taken to get gradients. Not counted are weights that are sent
        once for all steps (`gather="once"`, frozen), and what FSDP2 sends by itself: the all-reduce
        of native HSDP.

        Args:
            rank: Whose payloads; all ranks send the same sizes, to the same node or to others.
            micro_batches: Accumulated before one reduce: each gathers anew.
            reshard_after_forward: As given to `fully_shard`: None gathers the root's group once
                and all others twice, False gathers all once.
        """
        if self._wire.is_sparse:
            raise ValueError(
                "wire_bytes is for whole weights, but a support is set; call it before set_support"
            )
        if type(rank) is not int or not 0 <= rank < self._wire.world.num_ranks:
            raise ValueError(f"rank is {rank!r}; choose 0 to {self._wire.world.num_ranks - 1}")
        if type(micro_batches) is not int or micro_batches < 1:
            raise ValueError(f"micro_batches is {micro_batches!r}; choose a whole number from 1 on")
        return count_bytes(
            self._wire,
            self.shards[0],
            num_parameters=sum(p.numel() for p in self._model.parameters()),
            rank=rank,
            micro_batches=micro_batches,
            reshard_after_forward=reshard_after_forward,
        )

    def _pass_window(self, window: Sequence[Sequence[Any]], scale: float) -> list[list[float]]:
        """The micro-batches up to one reduce. Ranks come one after the other, so that only one
        rank's gradients are held at a time."""
        if self._has_reduced:
            self.clock, self._has_reduced = self.clock + 1, False
            self._wire.advance(self.clock, self.shards)
        weights = self.weights()
        reduction = Reduction(self._wire, self.clock)
        losses: list[list[float]] = [[] for _ in window]
        for rank in range(self._wire.world.num_ranks):
            kept: dict[str, Tensor] = {}
            for micro, per_rank in enumerate(window):
                loss, grads = self._loss_and_grads(weights, per_rank[rank], scale)
                losses[micro].append(loss)
                for name, grad in grads.items():
                    if name in kept:
                        kept[name] += grad  # rounded once, as FSDP2 adds it
                    else:
                        kept[name] = grad.to(self._wire.world.reduce_dtype)
            reduction.add(kept)
        for name, rank, grad in reduction.results():
            shard = self.shards[rank][name]
            grad = grad.to(shard.dtype)
            shard.grad = grad if shard.grad is None else shard.grad + grad
        self._has_reduced = True
        return losses

    def _loss_and_grads(
        self, weights: Mapping[str, Tensor], batch: Any, scale: float
    ) -> tuple[float, dict[str, Tensor]]:
        leaves = {
            name: value.detach().requires_grad_(self.shards[0][name].requires_grad)
            for name, value in weights.items()
        }
        whole = {
            self._pass.names[name]: value for name, value in {**self._buffers, **leaves}.items()
        }
        loss = functional_call(self._pass, whole, (batch, scale))
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return float(loss.detach()), grads

    @contextmanager
    def _casting_inputs(self) -> Iterator[None]:
        """Inside, modules with a group of their own cast floating-point inputs to the parameter
        dtype, as FSDP2 does by default."""
        dtype = self._wire.world.param_dtype

        def cast(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _cast(args, dtype), _cast(kwargs, dtype)

        modules = self._wire.numbers.modules if dtype != torch.float32 else ()
        hooks = [
            module.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
            for module in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Pass(nn.Module):
    """Forward and backward in one call, so that what is recomputed in the backward pass sees the
    parameters of `functional_call` too."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor] | None) -> None:
        super().__init__()
        self.model, self._loss = model, loss
        held = [*self.named_parameters(), *self.named_buffers()]
        own = [name for name, _ in held if name.startswith("model.")]  # a loss may hold some too
        clean = compat.clean_names(self, own)
        self.names = {short.removeprefix("model."): name for name, short in clean.items()}
        """By clean name in the model, the one that finds it here."""

    def forward(self, batch: Any, scale: float) -> Tensor:
        if isinstance(batch, Mapping):
            output = self.model(**batch)
        else:
            output = self.model(*((batch,) if isinstance(batch, Tensor) else batch))
        loss = output if self._loss is None else self._loss(output)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else "no tensor"
            raise ValueError(f"the loss is {what}; give `loss`, which makes a scalar of the output")
        torch.autograd.backward(loss * scale)
        return loss


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors in nested lists, tuples and dictionaries, in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast(entry, dtype) for entry in value)
    return value


def _grads(shards: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in shards.items() if p.grad is not None}


def _check_model(model: nn.Module, world: World, shard_dims: Mapping[str, int]) -> None:
    named = compat.named_parameters(model)
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters; give a model to train")
    for name in shard_dims:
        if name not in named:
            raise ValueError(f"shard_dims names {name!r}, which is no parameter of the model")
    for name, parameter in named.items():
        if isinstance(parameter, DTensor) or parameter.is_meta:
            raise ValueError(
                f"{name} is {'sharded' if isinstance(parameter, DTensor) else 'on meta'}; give the "
                "plain model with its initial weights"
            )
        if parameter.is_floating_point() and parameter.dtype not in CODEC_DTYPES:
            raise ValueError(
                f"{name} is {parameter.dtype}; qsdp sends float32, bfloat16 or float16"
            )
        if not parameter.dim():
            raise ValueError(f"{name} is a scalar, which FSDP2 cannot shard; give it one dimension")
        dim = shard_dims.get(name, 0)
        if not 0 <= dim < parameter.dim() or (dim and parameter.shape[dim] % world.world_size):
            raise ValueError(
                f"shard_dims gives {dim} for {name} of shape {tuple(parameter.shape)}; choose a "
                f"dimension that {world.world_size} ranks divide"
            )
