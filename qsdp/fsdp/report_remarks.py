"""What a handle's report remarks on: how all parameters travel, and what might surprise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qsdp.comm.group_plan import Plan
from qsdp.comm.topology import TopologySplit
from qsdp.common.rounding import Rounding
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.config import QSDPConfig
from qsdp.ops import native


def remarks(
    config: QSDPConfig,
    plans: Sequence[Plan],
    groups: Sequence[ParameterGroup],
    splits: Sequence[TopologySplit],
    *,
    is_allotted: bool,
) -> Iterator[str]:
    """The remarks of a report, one sentence each.

    Args:
        config: The config that ``install`` was given.
        plans, groups: Those of the handle.
        splits: Those of all process groups of several ranks.
        is_allotted: Whether the bits follow the budget by now.
    """
    yield native.remark(torch.device(groups[0].mesh.device_type))
    if config.rounding is not None and Rounding.of(config.rounding).properties.is_biased:
        lasting = "weights and gradients keep a systematic error"
        yield f"rounding {config.rounding} is biased: {lasting}"
    sizes = {plan.world_size for plan in plans}
    if sizes == {1}:
        yield "one rank: FSDP2 bypasses the collectives, weights and gradients are exact"
    if any(group.replicas > 1 for group in groups):
        whose = "FSDP2's own, in full precision and not counted"
        yield f"HSDP: the all-reduce between replicas is {whose}"
    if any(group.regather_world_size for group in groups):
        yield "reshard_after_forward=<int>: second gathers carry decoded weights, raw"
    if config.gather == "once":
        kept = "payloads of modules in training mode are kept"
        yield f"gather once: {kept} from the forward to the backward pass"
        frozen = sum(not each for group in groups for each in group.requires_grad())
        if frozen:
            how = "whole, on the uniform grid, without a warm-up"
            yield f"gather once: {frozen} frozen parameters are sent once for all steps, {how}"
    if config.gather == "delta":
        several = [plan for plan in plans if plan.world_size > 1]
        is_by_node = config.delta_codes == "node"
        num_bytes = sum(
            plan.kept_rows().payload_bytes
            * (plan.world_size // plan.stages[0].size if is_by_node else plan.world_size)
            for plan in several
        )
        whose = "its share of a node's codes" if is_by_node else "the codes of all weights"
        yield (
            f"gather delta: every rank keeps {whose} with their grids, {num_bytes:,} bytes, and is "
            "sent those that change"
        )
        if is_by_node:
            yield "gather delta: codes are gathered inside a node in each forward and backward pass"
        lasting = f"a room of {config.room:g} and at most {config.redraw_every} steps"
        yield f"gather delta: grids have {lasting}; load_grids goes on with those of a checkpoint"
    masked = _masked(config, plans, groups)
    if masked:
        num_kept, num_all = (sum(column) for column in zip(*masked, strict=True))
        sparse = any(plan.num_kept and plan.has_sparse_grads for plan in plans)
        share = f"the kept {num_kept / max(1, num_all):.1%} of the weights"
        grads = "and of the gradients" if sparse else "and all gradients"
        yield f"masks: of {len(masked)} parameters only {share} travel, {grads}"
    for split in splits:
        if not split.is_flat:
            bits = config.local_grad_bits or 8
            yield f"{split.words}: coded gradients travel at {bits} bits inside a node"
        elif config.needs_nodes:
            yield f"{split.words} would save nothing: reduces and gathers are flat"
    if config.levels == "learned":
        steps = ", ".join(map(str, config.learning_steps))
        whose = "gradients of " * (config.gather == "delta")
        yield f"learned levels for {whose}2 to 6 bits, fitted before steps {steps}"
    if config.grad_rotation != "none":
        which = "of 2 to 6 bits" if not config.has_budget else "of 2 to 6 bits or by the budget"
        yield f"rotation: gradients {which} are coded as Hadamard transforms, undone on their sums"
    if config.warmup_steps:
        least = f"at least {config.least_warmup_bits} bits"
        yield f"warm-up: {least} in the first {config.warmup_steps} steps"
    budget = config.budget_of(is_grad=True)
    if budget is not None:
        when = "allotted" if is_allotted else "to be allotted when measured"
        what = "gradient value" if config.budget is None else "value"
        yield f"budget: {budget:g} bits a coded {what}, {when}"


def _masked(
    config: QSDPConfig, plans: Sequence[Plan], groups: Sequence[ParameterGroup]
) -> list[tuple[int, int]]:
    """Kept and all values of each parameter of which only the kept ones are sent."""
    once = config.gather == "once"
    return [
        (num, plan.parameters[place].shape.numel())
        for plan, group in zip(plans, groups, strict=True)
        for place, num in plan.num_kept.items()
        if group.requires_grad()[place] or not once
    ]
