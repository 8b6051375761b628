"""A small mixture of experts in which some ranks own other experts than the rest.

They have the same names; the model of one process holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.helpers import all_ranks, local_part

EXPERTS = ["*expert*weight"]
"""Patterns of the experts alone."""


class Expert(nn.Module):
    """Two layers of odd sizes."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = self.down(F.gelu(self.up(x_BC)))
        return y_BC


class Block(nn.Module):
    """A layer that all ranks share, and an expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.expert = nn.Linear(width, width), Expert(width, hidden)

    def forward(self, x_BC: Tensor) -> Tensor:
        x_BC = x_BC + torch.tanh(self.attention(x_BC))
        x_BC = x_BC + self.expert(x_BC)
        return x_BC


class Mixture(nn.Module):
    """Two blocks and a head, of a few hundred parameters."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x_BC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BC = block(x_BC)
        return self.head(x_BC).square().mean()


def is_expert(name: str) -> bool:
    return "expert" in name


def make_mixture(
    owner: int,
    *,
    width: int = 6,
    hidden: int = 5,
    tied: bool = False,
    alike: bool = False,
    frozen: bool = False,
) -> Mixture:
    """The model as the ranks of sub-mesh number ``owner`` see it.

    Args:
        owner: Seeds the experts, and nothing else.
        width: Of the activations.
        hidden: Of the experts.
        tied: All magnitudes are 0.25, or 0.5 for about 70 % of them.
        alike: All experts start with the same values.
        frozen: What is shared needs no gradient.
    """
    with torch.random.fork_rng(devices=[]):
        model = Mixture(width, hidden)
        bound = 1.2 / width**0.5
        for number, (name, parameter) in enumerate(model.named_parameters()):
            torch.manual_seed(number + (100 * owner if is_expert(name) and not alike else 0))
            parameter.data.uniform_(-bound, bound)
            parameter.requires_grad_(is_expert(name) or not frozen)
            if tied:
                large = parameter.abs() > 0.3 * bound
                parameter.data.copy_(torch.where(large, 0.5, 0.25).copysign(parameter))
    return model


def make_inputs(model: Mixture, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, model.width, generator=generator)


@dataclass(frozen=True)
class Layout:
    """Which ranks own an expert together; the rest is sharded over all ranks."""

    owners: tuple[tuple[int, ...], ...]
    """Ranks of each sub-mesh."""
    replicas: bool = False
    """What is shared has a replica on each sub-mesh: HSDP over the mesh of both axes."""

    @property
    def ranks(self) -> int:
        return sum(map(len, self.owners))

    def owner_of(self, rank: int) -> int:
        """Number of the sub-mesh of ``rank``."""
        return next(i for i, ranks in enumerate(self.owners) if rank in ranks)

    def axis_of(self, name: str, rank: int) -> tuple[int, ...]:
        """The ranks whose shards make the whole parameter that ``rank`` has by that name."""
        own = self.owners[self.owner_of(rank)]
        return own if is_expert(name) or self.replicas else tuple(range(self.ranks))

    def part(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """What ``rank`` has of the whole."""
        axis = self.axis_of(name, rank)
        return local_part(whole, len(axis), axis.index(rank))

    def counts(self, name: str, rank: int) -> bool:
        """Whether the shard of ``rank`` is none that another rank before it has."""
        return is_expert(name) or not self.replicas or rank in self.owners[0]

    def meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        """Of what is shared, and of this rank's experts. A collective."""
        sizes = {len(ranks) for ranks in self.owners}
        if len(sizes) == 1:
            shape = (len(self.owners), *sizes)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ep", "fsdp"))
            return mesh if self.replicas else all_ranks(), mesh["fsdp"]
        groups = [dist.new_group(list(ranks)) for ranks in self.owners]
        own = groups[self.owner_of(dist.get_rank())]
        return all_ranks(), DeviceMesh.from_group(own, "cpu")

    def shard(self, ignored: set[nn.Parameter] | None = None, **options: Any) -> Any:
        """This rank's ``make_mixture(**options)``, sharded. A collective."""
        model = make_mixture(self.owner_of(dist.get_rank()), **options)
        everyone, own = self.meshes()
        for block in model.blocks:
            fully_shard(block.get_submodule("expert"), mesh=own)
            fully_shard(block, mesh=everyone)
        return fully_shard(model, mesh=everyone, ignored_params=ignored)

    def together(self, **options: Any) -> Together:
        """All ranks' models in one."""
        return Together(self, [make_mixture(i, **options) for i in range(len(self.owners))])


LAYOUTS = {
    "two of two": Layout(((0, 1), (2, 3))),
    "a rank each": Layout(((0,), (1,))),
    "one and two": Layout(((0,), (1, 2))),
    "replicas": Layout(((0, 1), (2, 3)), replicas=True),
}


class Together(nn.Module):
    """What the ranks of a layout hold, each expert a parameter of its own.

    They are in the order of the names, then of the sub-meshes.
    """

    def __init__(self, layout: Layout, parts: list[Mixture]) -> None:
        super().__init__()
        self.layout, self.parts = layout, tuple(parts)  # a tuple, so that they are no submodules
        for name, parameter in parts[0].named_parameters():
            for owner, part in enumerate(parts):
                if is_expert(name):
                    self.register_parameter(_flat(name, owner), part.get_parameter(name))
                else:
                    path, _, last = name.rpartition(".")
                    part.get_submodule(path).register_parameter(last, parameter)
            if not is_expert(name):
                self.register_parameter(_flat(name, 0), parameter)

    def names(self, chosen: Callable[[str], bool]) -> list[str]:
        """This model's names of the parameters whose name on the ranks is ``chosen``."""
        names = [name for name, _ in self.parts[0].named_parameters() if chosen(name)]
        owners = range(len(self.parts))
        return [_flat(n, i) for n in names for i in (owners if is_expert(n) else [0])]

    def name_of(self, name: str, rank: int) -> str:
        """This model's name of what ``rank`` calls ``name``."""
        return _flat(name, self.layout.owner_of(rank) if is_expert(name) else 0)

    def backward(self, step: int) -> Tensor:
        """Gradients as fully_shard leaves them: means over the ranks of a parameter's mesh."""
        ranks = range(self.layout.ranks)
        parts = [self.parts[self.layout.owner_of(rank)] for rank in ranks]
        losses = [
            part(make_inputs(part, rank, step)) for rank, part in zip(ranks, parts, strict=True)
        ]
        torch.stack(losses).sum().backward()
        for name, _ in self.parts[0].named_parameters():
            for owner, own in enumerate(self.layout.owners if is_expert(name) else [ranks]):
                grad = self.get_parameter(_flat(name, owner)).grad
                if grad is not None:
                    grad /= len(own)
        return torch.stack(losses).mean().detach()


def _flat(name: str, owner: int) -> str:
    """torch wants no dots in a parameter's own name."""
    return f"{name.replace('.', '_')}_{owner}"


def in_blocks(name: str) -> bool:
    """Of the default prunable set."""
    return name.startswith("blocks") and name.endswith("weight")


def values_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of this rank's part of each."""
    return {name: local_shard(tensor).values.clone() for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Method:
    """An optimizer, and what it is given."""

    make: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 3
    prunes: str | None = "default"
    """``default``, ``experts``, or None for a method that prunes nothing."""
    base_has: str = "all"
    """``all`` or ``experts``; the rest is frozen then."""

    @property
    def frozen(self) -> bool:
        return self.base_has == "experts"

    def around(self, model: nn.Module, lr: float = 0.1) -> Any:
        """The optimizer of a rank's model, or of a ``Together``."""
        parameters = [
            p for name, p in model.named_parameters() if self.base_has == "all" or is_expert(name)
        ]
        base = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        options = dict(self.options)
        if self.prunes is not None:
            patterns = EXPERTS if self.prunes == "experts" else None
            if isinstance(model, Together):
                only_experts = self.prunes == "experts"
                patterns = model.names(lambda n: in_blocks(n) and is_expert(n) >= only_experts)
            options["prunable"] = patterns
        return self.make(model, base, **options)


@dataclass
class Trail:
    """What a training left on one rank."""

    zeros: list[dict[str, Tensor]] = field(default_factory=list)
    """By pass, which weights were zero in it."""
    norms: list[float] = field(default_factory=list)
    """By step, of what the base optimizer was given, before clipping."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """The weights at the end."""
    skipped: int = 0


def train(method: Method, model: nn.Module, backward: Callable[[int], Tensor]) -> Trail:
    """Take the steps of ``method``, each by a closure."""
    optimizer = method.around(model)
    return take_steps(method, model, optimizer, backward)


def take_steps(
    method: Method, model: nn.Module, optimizer: Any, backward: Callable[[int], Tensor]
) -> Trail:
    """As ``train``, with an optimizer that was made before."""
    parameters, trail = dict(model.named_parameters()), Trail()
    for step in range(method.steps):

        def closure(step: int = step) -> Tensor:
            trail.zeros.append({name: v == 0 for name, v in values_of(parameters).items()})
            for parameter in parameters.values():
                parameter.grad = None
            return backward(step)

        optimizer.step(closure)
        trail.norms.append(optimizer.last_grad_norm)
    trail.values, trail.skipped = values_of(parameters), optimizer.skipped_steps
    return trail


def backward_on_rank(model: Any, step: int) -> Tensor:
    loss: Tensor = model(make_inputs(model, dist.get_rank(), step))
    torch.autograd.backward(loss)
    return loss.detach()
