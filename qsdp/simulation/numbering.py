"""The numbering of parameters and groups, by which the simulation's random keys go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from qsdp.compat.parameter_names import named_parameters

Group = str | nn.Module | Sequence[str | nn.Module]


@dataclass(frozen=True)
class Numbering:
    """The numbering of a simulated model: places in the random generator's counter.

    They are as ``qsdp.install`` counts them.
    """

    parameters: Mapping[str, int]
    """The number of each parameter, in the order of ``named_parameters``."""
    groups: Mapping[str, int]
    """The group of each parameter, in the order of ``modules()``."""
    root: int | None
    """The root's group; None if all parameters are in groups of submodules."""
    modules: Mapping[nn.Module, int | None]
    """The modules that ``fully_shard`` is called on, each with its call's group.
    None where groups of submodules have all its parameters.
    """


def number_model(model: nn.Module, groups: Sequence[Group]) -> Numbering:
    """Number the parameters and groups of a simulated model as FSDP2 would make them.

    It would make groups of calls from the inside out.

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
            module = _module_of_member(model, names, member)
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
    return Numbering(
        {name: index for index, name in enumerate(named)},
        {name: numbers[found[parameter]] for name, parameter in named.items()},
        numbers.get(0),
        {module: numbers.get(call) for module, call in call_of.items()},
    )


def _module_of_member(
    model: nn.Module, names: Mapping[nn.Module, str], member: object
) -> nn.Module:
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
