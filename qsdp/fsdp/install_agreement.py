"""Ranks that disagree stop at install, and every rank says what the difference is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qsdp.codec.payload import VERSION
from qsdp.comm.group_plan import Plan
from qsdp.common.rank_agreement import compare
from qsdp.common.user_errors import names_for_user
from qsdp.compat.parameter_group import ParameterGroup
from qsdp.config import QSDPConfig

Description = dict[str, Any]
"""What must be equal on all ranks, in plain types; for a rank that cannot install, its mistake."""

CALL = "qsdp.install"


def describe_install(
    config: QSDPConfig, groups: Sequence[ParameterGroup], plans: Sequence[Plan]
) -> Description:
    """What ranks must agree on at install: all that numbers, sizes and order depend on."""
    return {
        "versions": {
            "torch": torch.__version__,
            "qsdp": _qsdp_version(),
            "qsdp's payloads": VERSION,
        },
        "config": {field.name: getattr(config, field.name) for field in fields(config)},
        # In words, for the message; all but the name may differ.
        "parameters": {
            p.name: (
                f"of shape {'x'.join(map(str, p.shape)) or '()'}",
                f"of type {p.dtype}",
                f"sharded by dimension {p.shard_dim}",
                "trainable" if is_trained else "frozen",
                f"with {p.weight_bits} weight bits and {p.grad_bits} gradient bits",
                f"as place {place} of the group of {plan.name}",
                f"as parameter {p.index} of the model",
            )
            for group, plan in zip(groups, plans, strict=True)
            for place, (p, is_trained) in enumerate(
                zip(plan.parameters, group.requires_grad(), strict=True)
            )
        },
        "groups": {
            f"the group of {plan.name}": (
                f"as group {plan.index}",
                f"over {plan.world_size} ranks",
                f"reduced in {group.reduce_dtype or 'its own type'}",
                "resharded after the forward"
                if group.reshards_after_forward
                else "gathered until the backward",
                f"gathered again over {group.regather_world_size or plan.world_size} ranks",
                "with" + "out" * (not group.reduces_unused) + " reduce_scatter_unused_params",
            )
            for group, plan in zip(groups, plans, strict=True)
        },
    }


def describe_meshes(**meshes: DeviceMesh | None) -> Description:
    """What ranks must agree on first at install: which meshes it was given, and their shapes."""
    shapes = {name: None if mesh is None else tuple(mesh.shape) for name, mesh in meshes.items()}
    return {"versions": {}, "config": shapes, "parameters": {}, "groups": {}}


def install_facts_by_rank(everyone: Sequence[dist.ProcessGroup], mine: int) -> dict[int, int]:
    """What each global rank calls ``mine`` at install, as agreement on it begins; a collective."""
    found = compare(CALL, {"mine": mine}, everyone)
    if found is None:
        return dict.fromkeys(range(dist.get_world_size()), mine)
    _check_mistakes(found)
    return {rank: facts["mine"] for rank, facts in found.items()}


def check_install_agreement(everyone: Sequence[dist.ProcessGroup], mine: Description) -> None:
    """Raise RuntimeError, on every rank, unless all agree at install on what they describe.

    They say what the difference is. A collective. Headers come too late for most of what can
    differ: payloads of unequal sizes end the process (gloo) or hang it (NCCL), and a seed is in no
    header.

    Args:
        everyone: The process groups of all axes of the model's mesh.
        mine: This rank's description.
    """
    found = compare(CALL, mine, everyone)
    if found is None:
        return
    _check_mistakes(found)
    first, *others = found
    for rank in others:
        if found[rank] != found[first]:
            raise RuntimeError(_difference(rank, found[rank], first, found[first]))


def _check_mistakes(found: Mapping[int, Description]) -> None:
    for rank, description in found.items():
        if "mistake" in description:
            raise RuntimeError(
                f"rank {rank} cannot install qsdp ({description['mistake']}): give every rank the "
                "same model and config."
            )


def _difference(rank: int, ours: Description, first: int, theirs: Description) -> str:
    """One sentence on the first difference between two unequal descriptions."""
    for name, mine in ours["versions"].items():
        other = theirs["versions"][name]
        if mine != other:
            return (
                f"rank {rank} has version {mine} of {name} but rank {first} has {other}: "
                "install the same on every rank."
            )
    for field, value in ours["config"].items():
        other = theirs["config"][field]
        if value != other:
            return (
                f"rank {rank} installs qsdp with {field} {value!r} but rank {first} with "
                f"{other!r}: give every rank the same config and meshes."
            )
    for kind in ("parameters", "groups"):
        mine, others = ours[kind], theirs[kind]
        for lacking, few, having, many in (
            (rank, mine, first, others),
            (first, others, rank, mine),
        ):
            if missing := [name for name in many if name not in few]:
                return (
                    f"rank {lacking} does not shard {names_for_user(missing)} but rank {having} "
                    f"does ({len(few)} and {len(many)} {kind}): build and shard the same model on "
                    "every rank."
                )
        for name, facts in mine.items():
            for fact, other in zip(facts, others[name], strict=True):
                if fact != other:
                    return (
                        f"rank {rank} has {name} {fact} but rank {first} has it {other}: build "
                        "and shard the same model on every rank."
                    )
    raise AssertionError(f"ranks {rank} and {first} list the same parameters in another order.")


def _qsdp_version() -> str:
    try:
        return version("qsdp")
    except PackageNotFoundError:  # the sources are on the path, and nothing is installed
        return "not installed"
