"""The ranks that are simulated, and the numbers that the keys give to parameters and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from qsdp.common.dtypes import CODEC_DTYPES
from qsdp.compat.parameter_names import named_parameters

Group = str | nn.Module | Sequence[str | nn.Module]


@dataclass(frozen=True, kw_only=True)
class World:
    """The simulated ranks: global rank = replica * world_size + rank in the shard group."""

    world_size: int
    """Ranks of the shard axis."""
    ranks_per_node: int = 1
    replicas: int = 1
    """Ranks of the replicate axis (HSDP)."""
    quantized_replicas: bool = False
    """Whether the all-reduce between replicas is qsdp's, or FSDP2's own."""
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node", "replicas"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: choose a whole number from 1 on.")
        for name in ("param_dtype", "reduce_dtype"):
            if getattr(self, name) not in CODEC_DTYPES:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose torch.float32, torch.bfloat16 or "
                    "torch.float16."
                )
        if self.quantized_replicas and (self.replicas == 1 or self.world_size == 1):
            raise ValueError(
                f"quantized_replicas is on for {self.replicas} replicas of {self.world_size} "
                "ranks: give 2 or more of both, or leave it off."
            )

    @property
    def num_ranks(self) -> int:
        return self.world_size * self.replicas

    @property
    def has_even_nodes(self) -> bool:
        """Whether every node has as many ranks of the shard group as any other."""
        small, large = sorted((self.ranks_per_node, self.world_size))
        return self.ranks_per_node >= self.num_ranks or large % small == 0

    @property
    def ranks_of_a_node(self) -> int:
        """Ranks of the shard group on one node, where nodes are even."""
        return min(self.ranks_per_node, self.world_size)


@dataclass(frozen=True)
class Numbers:
    """Places in the random generator's counter, as ``qsdp.install`` counts them."""

    parameters: Mapping[str, int]
    """The number of each parameter, in the order of ``named_parameters``."""
    groups: Mapping[str, int]
    """The group of each parameter, in the order of ``modules()``."""
    root: int | None
    """The root's group; None if all parameters are in groups of submodules."""
    modules: tuple[nn.Module, ...]
    """The modules that ``fully_shard`` is called on."""


def number(model: nn.Module, groups: Sequence[Group]) -> Numbers:
    """Number parameters and groups as FSDP2 would make them of calls from the inside out.

    Args:
        model: The plain model.
        groups: What ``fully_shard`` is called on before the root: modules or their names, or lists
            of them for one call on several modules. The root may be among them.

    Raises:
        ValueError: A name or module is not of the model, or is given twice, or a parameter is
            tied across groups, which FSDP2 would untie.
    """
    names = {module: name for name, module in model.named_modules()}
    call_of: dict[nn.Module, int] = {model: 0}
    for call, group in enumerate(groups, start=1):
        members = [group] if isinstance(group, str | nn.Module) else group
        for member in members:
            module = _resolve(model, names, member)
            if module is model:
                continue
            if module in call_of:
                raise ValueError(f"groups has {names[module]!r} twice: give every module once.")
            call_of[module] = call
    found: dict[nn.Parameter, int] = {}
    _assign(model, 0, call_of, found)
    used = set(found.values())
    numbers: dict[int, int] = {}
    for module in model.modules():
        if call_of.get(module) in used:
            numbers.setdefault(call_of[module], len(numbers))
    named = named_parameters(model)
    return Numbers(
        {name: index for index, name in enumerate(named)},
        {name: numbers[found[parameter]] for name, parameter in named.items()},
        numbers.get(0),
        tuple(call_of),
    )


def _resolve(model: nn.Module, names: Mapping[nn.Module, str], member: object) -> nn.Module:
    if isinstance(member, nn.Module) and member in names:
        return member
    if isinstance(member, str):
        # Wrappers look up in what they wrap, so names may skip them.
        with suppress(AttributeError):
            if (module := model.get_submodule(member)) in names:
                return module
    given = type(member).__name__ if isinstance(member, nn.Module) else repr(member)
    raise ValueError(
        f"groups holds {given}, which is no module of this {type(model).__name__}: give modules of "
        "model.named_modules(), or their names."
    )


def _assign(
    module: nn.Module,
    call: int,
    call_of: Mapping[nn.Module, int],
    found: dict[nn.Parameter, int],
) -> None:
    """Give every parameter under ``module`` the innermost call around it."""
    call = call_of.get(module, call)
    for name, parameter in module.named_parameters(recurse=False):
        if found.setdefault(parameter, call) != call:
            raise ValueError(
                f"the parameter {name!r} of a {type(module).__name__} is shared by two groups, "
                "which FSDP2 would untie: put both of its modules into one group."
            )
    for child in module.children():
        _assign(child, call, call_of, found)
