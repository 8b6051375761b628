"""Whether gradients are mere views of a reduce's output, which may then be filled later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from qsdp.compat.autograd import is_in_backward, is_in_compiled_backward
from qsdp.compat.parameter_group import ParameterGroup


def gradients_are_views(group: ParameterGroup, output: Tensor) -> bool:
    """Whether gradients of ``group`` are views of a reduce's ``output``, which FSDP2 only divides.

    This is as far as it depends on what all ranks have in common. There must also be an end of a
    backward pass to wait for.
    """
    return (
        output.device.type == "cpu"
        and is_in_backward()
        and not is_in_compiled_backward()
        and output.dtype == group.fsdp_param_group._orig_dtype
        and group.replicas == 1
    )


def views_may_fill_later(group: ParameterGroup, places: Sequence[int]) -> bool:
    """Whether gradients that are views may be filled later, by what a rank may have alone.

    They may where nothing is added to the gradients of the parameters at ``places``, and nobody is
    shown them, before the backward pass ends.
    """
    params = [group.fsdp_param_group.fsdp_params[i] for i in places]
    return (
        group.fsdp_param_group._all_reduce_hook is None
        and all(p.sharded_param.grad is None and not p.offload_to_cpu for p in params)
        and not group.parameters_with_hooks().intersection(places)
    )


def gradient_views_divider(group: ParameterGroup, output: Tensor) -> Callable[[Tensor], None]:
    """What FSDP2 does in place, as things are now, to a sum of which gradients are views.

    It is for a sum of a reduce of ``group``, like ``output`` that FSDP2 has not seen yet.
    """
    settings = group.fsdp_param_group
    _, factor, *_ = _fsdp_collectives._get_gradient_divide_factors(
        group.shard_group,
        None,
        output.dtype,
        output.device.type,
        settings.gradient_divide_factor,
        settings.force_sum_reduction_for_comms,
    )
    return partial(_fsdp_collectives._div_if_needed, div_factor=factor)
