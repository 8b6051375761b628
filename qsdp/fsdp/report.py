"""What ``handle.report()`` says: how every parameter travels, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qsdp.comm.group_plan import Plan
from qsdp.compat.parameter_group import ParameterGroup


@dataclass(frozen=True)
class Row:
    """A row of the report: how one parameter travels."""

    name: str
    shape: tuple[int, ...]
    group: int | None
    """None for a parameter that FSDP2 does not shard: it does not travel."""
    weight: str
    """How it travels in the gather: ``8 bits``, ``raw float32``, ...; ``none`` when it does not."""
    grad: str
    """How its gradient travels in the reduce: ``4 bits, rotated``, ...

    ``none`` when it is frozen or not sharded.
    """
    why: str


@dataclass(frozen=True)
class Report:
    """The report: rows in the model's order, and remarks on what might surprise."""

    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "group", "weight", "gradient", "why")
        lines = [head]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            group = "-" if row.group is None else str(row.group)
            lines.append((row.name, shape, group, row.weight, row.grad, row.why))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *(f"note: {remark}" for remark in self.remarks)])


def sharded_rows(plans: Sequence[Plan], groups: Sequence[ParameterGroup]) -> dict[int, Row]:
    """The report's rows of parameters with a plan, as things are now, by places in the model."""
    rows = {}
    for plan, group in zip(plans, groups, strict=True):
        for p, is_trained in zip(plan.parameters, group.requires_grad(), strict=True):
            weight = _travels_as(p.weight_bits, p.dtype)
            grad = _travels_as(p.grad_bits, group.reduce_dtype or p.dtype, is_grad=True)
            grad += ", rotated" if plan.rotates_in(p) else ""
            why = p.why if is_trained else f"{p.why}, frozen"
            row = Row(p.name, tuple(p.shape), plan.index, weight, grad, why)
            rows[p.index] = row if is_trained else replace(row, grad="none")
    return rows


def unsharded_rows(names: Mapping[nn.Parameter, str], plans: Sequence[Plan]) -> dict[int, Row]:
    """The report's rows of parameters without a plan, by place; ``names`` is of the whole model."""
    planned = {p.name for plan in plans for p in plan.parameters}
    return {
        place: Row(name, tuple(p.shape), None, "none", "none", "not sharded by FSDP2")
        for place, (p, name) in enumerate(names.items())
        if name not in planned
    }


def _travels_as(bits: int, dtype: torch.dtype, *, is_grad: bool = False) -> str:
    if bits <= 8:
        return f"{bits} bits"
    if bits == 16 and dtype == torch.float32:
        return "bfloat16"
    return "raw" if is_grad else f"raw {dtype}".replace("torch.", "")
