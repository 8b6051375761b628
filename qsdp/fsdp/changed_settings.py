"""What a user did after ``qsdp.install`` that would take a group off the wire, or its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qsdp.comm.group_plan import Plan
from qsdp.common.user_errors import names_for_user
from qsdp.compat.parameter_group import ParameterGroup

_HOOK = "set_all_reduce_hook"
_SETTERS = (
    "set_custom_all_gather",
    "set_custom_reduce_scatter",
    "set_force_sum_reduction_for_comms(False)",
    _HOOK,
)


def mistake(
    plan: Plan,
    group: ParameterGroup,
    installed: Sequence[Any],
    *,
    averages: bool,
    in_backward: bool,
) -> str:
    """What takes ``group`` off the wire, its gradients to other sums, or its weights to others.

    It is one sentence; an empty text if nothing does.

    Args:
        plan: How the group travels.
        group: The group as FSDP2 has it now.
        installed: Its ``comms`` as install has set them.
        averages: Whether qsdp averages over replicas.
        in_backward: Whether the group is about to be reduced.
    """
    kept = zip(_SETTERS, group.comms(), installed, strict=False)
    changed = [setter for setter, now, then in kept if now is not then]
    if not averages and _HOOK in changed:
        changed.remove(_HOOK)  # it is the user's
    if changed:
        return (
            f"{changed[0]} was called on the group of {plan.name} after qsdp.install, which "
            "needs that for the wire: leave it out, or call handle.remove() first."
        )
    if len(plan.stages) > 1 and group.has_own_reduce_group:
        return (
            f"set_separate_reduce_scatter_group was called on the group of {plan.name}, which "
            "reduces in several hops, over process groups of qsdp's own: leave it out, or take "
            'QSDPConfig(reduce="flat").'
        )
    if in_backward and installed[0].has_changed_sides:
        return (
            f"the forward pass of {plan.name} was on the other side of handle.aside(), where "
            "weights are others, than its backward pass is: take both inside, or both outside."
        )
    puts_off = in_backward and averages and group.reduces and not group.all_reduces
    if puts_off and (hooked := group.parameters_with_hooks()):
        return (
            f"{names_for_user([plan.names[i] for i in sorted(hooked)])} has a hook on its "
            "gradient, which would find zeros while set_requires_all_reduce(False) puts the "
            "average over replicate_mesh off: remove the hook, or leave "
            "set_requires_all_reduce(True)."
        )
    return ""
