"""The switches of FSDP2: how each is used, where, and where it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    register_fsdp_forward_method,
    share_comm_ctx,
)
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import Shard

# By name: the replicas of stock FSDP2, what qsdp.QSDPConfig is given, whether replicas are qsdp's.
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "shards": (1, {}, False),
    "gathered once": (1, {"gather": "once"}, False),
    "two hops": (1, {"reduce": "two-hop", "ranks_per_node": 2}, False),
    "native HSDP": (2, {}, False),
    "replicate_mesh": (2, {}, True),
}
REPLICATED = (3, 4)
# The micro-batch before which a switch is set, or before qsdp.install.
TIMES: dict[str, int] = {"before install": -1, "after install": 0, "in between": 1}
AT_ONCE = ("before install",)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One switch, and how it is used."""

    set: Callable[[Any], object] | None = None
    """Called once with the model."""
    each: Callable[[Any, int], object] | None = None
    """Called with the model before each micro-batch, whose number it is given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of ``fully_shard``."""
    root: dict[str, Any] = field(default_factory=dict)
    """More, of the root alone."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of ``make_model``."""
    ignored: str = ""
    """The name of a parameter for ``ignored_params``."""
    note: Callable[[Any], object] | None = None
    """What else of the model to compare after each micro-batch."""
    refused: Callable[[str, str], str] = lambda layout, time: ""
    """By layout and time a part of the sentence that refuses it; empty where it is honoured."""
    tolerance: float = 1e-5
    """Of 32 bits, relative: sums in a type that is narrower come in another order."""
    times: tuple[str, ...] = tuple(TIMES)
    """At which it can be set here."""


def _policy(**fields: Any) -> Switch:
    narrow = 2e-2 if {torch.bfloat16, torch.float16} & set(fields.values()) else 1e-5
    policy = MixedPrecisionPolicy(**fields)
    return Switch(options={"mp_policy": policy}, tolerance=narrow, times=AT_ONCE)


def on_all_modules(name: str, *args: Any) -> Callable[[Any], None]:
    """Call a setter that is not recursive on every module."""

    def set_all(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                getattr(module, name)(*args)

    return set_all


def _by_micro_batch(name: str, *values: bool) -> Switch:
    return Switch(
        each=lambda model, micro: getattr(model, name)(values[micro]), times=("after install",)
    )


def _after_install(what: str) -> Callable[[str, str], str]:
    """Refused at install, or in the next pass."""

    def sentence(layout: str, time: str) -> str:
        return "has a collective of its own" if time == "before install" else what

    return sentence


def _divided(model: Any, name: str) -> None:
    # Stock FSDP2 would multiply before the sum, which gloo cannot.
    on_all_modules("set_force_sum_reduction_for_comms", True)(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        on_all_modules(name, 3.0)(model)


def double(tensor: Tensor) -> None:
    tensor.mul_(2)


def _prefetch(model: Any, direction: str) -> None:
    first, second = model.blocks
    if direction == "forward":
        model.set_modules_to_forward_prefetch([first, second])
        first.set_modules_to_forward_prefetch([second])
    else:
        model.set_modules_to_backward_prefetch([second, first])
        second.set_modules_to_backward_prefetch([first])


def _refused_by_fsdp2(layout: str, time: str) -> str:
    return "has a collective of its own" if time == "before install" else "cannot call"


def _state(model: Any) -> Any:
    return model._get_fsdp_state()


class Event:
    """In the place of a GPU's."""


SWITCHES: dict[str, Switch] = {
    "set_is_last_backward": _by_micro_batch("set_is_last_backward", False, False, True),
    "set_requires_gradient_sync": _by_micro_batch("set_requires_gradient_sync", False, False, True),
    "set_requires_all_reduce": _by_micro_batch("set_requires_all_reduce", False, False, True),
    "set_requires_all_reduce, after gradients": _by_micro_batch(
        "set_requires_all_reduce", True, False, True
    ),
    "set_reshard_after_forward": Switch(set=lambda model: model.set_reshard_after_forward(False)),
    "set_reshard_after_forward of the root": Switch(
        set=lambda model: model.set_reshard_after_forward(True, recurse=False)
    ),
    "set_reshard_after_backward": _by_micro_batch("set_reshard_after_backward", False, True, False),
    "set_modules_to_forward_prefetch": Switch(set=lambda model: _prefetch(model, "forward")),
    "set_modules_to_backward_prefetch": Switch(set=lambda model: _prefetch(model, "backward")),
    "set_custom_all_gather": Switch(
        set=on_all_modules("set_custom_all_gather", type("Own", (DefaultAllGather,), {})()),
        refused=_after_install("set_custom_all_gather was called"),
    ),
    "set_custom_reduce_scatter": Switch(
        set=on_all_modules("set_custom_reduce_scatter", type("Own", (DefaultReduceScatter,), {})()),
        refused=_after_install("set_custom_reduce_scatter was called"),
    ),
    "set_all_reduce_hook": Switch(
        set=on_all_modules("set_all_reduce_hook", double),
        refused=lambda layout, time: (
            ""
            if layout != "replicate_mesh"
            else "has a hook of set_all_reduce_hook"
            if time == "before install"
            else "set_all_reduce_hook was called"
        ),
    ),
    "set_post_optim_event": Switch(
        each=lambda model, micro: model.set_post_optim_event(Event()),
        times=("after install",),
        note=lambda model: _state(model)._state_ctx.post_optim_event,
    ),
    "set_reduce_scatter_divide_factor": Switch(
        set=lambda model: _divided(model, "set_reduce_scatter_divide_factor")
    ),
    "set_gradient_divide_factor": Switch(
        set=lambda model: _divided(model, "set_gradient_divide_factor")
    ),
    "set_force_sum_reduction_for_comms": Switch(
        set=on_all_modules("set_force_sum_reduction_for_comms", True)
    ),
    "set_force_sum_reduction_for_comms(False)": Switch(
        set=on_all_modules("set_force_sum_reduction_for_comms", False),
        refused=lambda layout, time: "" if time == "before install" else "(False) was called",
    ),
    "set_reduce_scatter_unused_params": Switch(
        set=lambda model: model.set_reduce_scatter_unused_params(True), model={"unused": True}
    ),
    "set_reduce_scatter_max_input_buffers": Switch(
        set=lambda model: model.set_reduce_scatter_max_input_buffers(2),
        note=lambda model: _state(model)._comm_ctx.reduce_scatter_max_input_buffers,
    ),
    "set_separate_reduce_scatter_group": Switch(
        set=lambda model: model.set_separate_reduce_scatter_group(True),
        refused=lambda layout, time: (
            "set_separate_reduce_scatter_group was called" if layout == "two hops" else ""
        ),
    ),
    "set_unshard_in_backward": Switch(set=lambda model: model.embed.set_unshard_in_backward(False)),
    "set_allocate_memory_from_process_group_for_comm": Switch(
        set=on_all_modules("set_allocate_memory_from_process_group_for_comm", True),
        refused=_refused_by_fsdp2,
    ),
    "set_symm_mem_for_comm": Switch(
        # Stock FSDP2 would need a GPU.
        set=on_all_modules("set_symm_mem_for_comm"),
        refused=_refused_by_fsdp2,
        times=("after install",),
    ),
    "_set_unshard_async_op": Switch(set=lambda model: model._set_unshard_async_op(True)),
    "mesh": Switch(times=AT_ONCE),
    "reshard_after_forward": Switch(options={"reshard_after_forward": True}, times=AT_ONCE),
    "reshard_after_forward, int": Switch(options={"reshard_after_forward": 2}, times=AT_ONCE),
    "shard_placement_fn": Switch(
        options={"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 else None},
        model={"width": 16, "hidden": 8, "vocab_size": 16},
        times=AT_ONCE,
    ),
    "ignored_params": Switch(ignored="head.weight", times=AT_ONCE),
    "MixedPrecisionPolicy.param_dtype": _policy(param_dtype=torch.bfloat16),
    "MixedPrecisionPolicy.reduce_dtype": _policy(reduce_dtype=torch.bfloat16),
    "MixedPrecisionPolicy.reduce_dtype, wider": _policy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    ),
    "MixedPrecisionPolicy.reduce_dtype, half": _policy(reduce_dtype=torch.float16),
    "MixedPrecisionPolicy.output_dtype": Switch(
        root={"mp_policy": MixedPrecisionPolicy(output_dtype=torch.bfloat16)},
        tolerance=2e-2,
        times=AT_ONCE,
    ),
    "MixedPrecisionPolicy.cast_forward_inputs": _policy(
        param_dtype=torch.bfloat16, cast_forward_inputs=False
    ),
    "offload_policy": Switch(options={"offload_policy": OffloadPolicy()}, times=AT_ONCE),
    "offload_policy, CPUOffloadPolicy": Switch(
        options={"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        refused=lambda layout, time: "uses CPUOffloadPolicy",
        times=AT_ONCE,
    ),
    "register_fsdp_forward_method": Switch(
        set=lambda model: register_fsdp_forward_method(model.blocks[0].mlp, "forward"),
        times=AT_ONCE,
    ),
    "share_comm_ctx": Switch(
        set=lambda model: share_comm_ctx([model, *model.blocks]), times=AT_ONCE
    ),
}
