"""Names of parameters and buffers without what wrappers of modules add to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.nn.parallel import DistributedDataParallel

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""What the wrappers of ``torch.compile`` and of activation checkpointing call what they wrap."""


def clean_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The name in the model as the user wrote it, for each of ``names`` of what ``model`` holds.

    It lacks the names of the wrappers of ``torch.compile``, activation checkpointing and DDP.
    Raises ValueError if two become one.
    """
    clean: dict[str, str] = {}
    of: dict[str, str] = {}
    for name in names:
        short = _clean_name(model, name)
        if short in of:
            raise ValueError(
                f"{of[short]!r} and {name!r} are both {short!r} once the names of wrappers are "
                "left out: rename one of them."
            )
        clean[name], of[short] = short, name
    return clean


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model``, tied ones once, in its order, by their ``clean_names``."""
    named = dict(model.named_parameters())
    return {clean: named[name] for name, clean in clean_names(model, named).items()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``model`` by their ``clean_names``, as ``named_parameters``."""
    named = dict(model.named_buffers())
    return {clean: named[name] for name, clean in clean_names(model, named).items()}


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """The clean name by each name that DCP has for what ``model`` holds.

    DCP leaves out some wrappers' names itself.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        theirs: clean
        for names in (parameters, model.state_dict())  # two spellings of what wrappers hold
        for name, clean in clean_names(model, names).items()
        for theirs in dcp_state_dict._get_fqns(model, name)
    }


def unwrapped(module: nn.Module) -> nn.Module:
    """``module`` without wrappers that parameter names leave out: compiled, or checkpointed."""
    while (inner := _wrapped_module(module)) is not None:
        module = inner
    return module


def _clean_name(model: nn.Module, name: str) -> str:
    module: Any = model
    parts = []
    for part in name.split("."):
        # What a wrapper does not have it looks up in what it wraps, so names may skip it.
        if part not in _WRAPPED:
            module = unwrapped(module)
        is_ddp = part == "module" and isinstance(module, DistributedDataParallel)
        if part not in _WRAPPED and not is_ddp:
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def _wrapped_module(module: Any) -> Any:
    children = getattr(module, "_modules", {})
    return next((children[name] for name in _WRAPPED if name in children), None)
