"""Which gradients of a reduce are rotated: by the bits outside of nodes, and only what is valid."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qsdp.comm.group_plan import Parameter, Plan
from qsdp.config import QSDPConfig
from qsdp.ops.reference.rotation import rotated

BITS = (4, 7, 32, 2)
SHAPES = ((5, 7), (6, 50), (3, 4), (2, 300))


class Ranks:
    """What a plan asks of a process group."""

    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 1


def a_plan(**settings: Any) -> Plan:
    parameters = [
        Parameter(
            name=f"weight {i}",
            index=i,
            shape=torch.Size(shape),
            dtype=torch.float32,
            shard_dim=0,
            weight_bits=8,
            grad_bits=bits,
            keeps_bits=i == 3,
            why="",
        )
        for i, (shape, bits) in enumerate(zip(SHAPES, BITS, strict=True))
    ]
    config = QSDPConfig(**{"grad_bits": 4, "grad_rotation": "hadamard", **settings})
    return Plan(parameters, 0, cast(Any, Ranks()), config)


def parts_of(row: Tensor) -> list[Tensor]:
    """By parameter, of a rank's slice as FSDP2 pads it."""
    return list(row.split([2 * 7, 2 * 50, 4, 300]))


def test_valid_values_of_few_bits_are_rotated_in_place_and_back() -> None:
    plan, places = a_plan(), (0, 1, 2, 3)
    rows = torch.randn(3, 418)
    for dtype in (torch.float32, torch.bfloat16):
        for is_local in (False, True):
            layout = plan.reduce(places, dtype, is_local=is_local)
            before = rows.to(dtype)
            found = before.clone()
            layout.rotate(found)
            for rank in range(3):
                valid = [min(7 * max(0, 5 - 2 * rank), 14), 100, 4, 300 * (rank < 2)]
                pairs = zip(parts_of(before[rank]), parts_of(found[rank]), valid, strict=True)
                for i, (was, now, num) in enumerate(pairs):
                    expected = was.clone()
                    if i in (0, 3):
                        expected[:num] = rotated(was[:num].float(), 256).to(dtype)
                    assert torch.equal(now, expected), (dtype, rank, i)
    sums = rows[1:2].clone()
    layout.rotate(sums, 1)
    assert not torch.equal(sums, rows[1:2])
    layout.rotate(sums, 1)
    torch.testing.assert_close(sums, rows[1:2], rtol=0, atol=5e-6)


def test_which_gradients_are_rotated_follows_from_their_bits() -> None:
    def found(plan: Plan, **options: Any) -> list[int]:
        layout = plan.reduce((0, 1, 2, 3), torch.float32, **options)
        assert [each.rotates_in for each in layout.segments] == [
            plan.rotates_in(p, options.get("least_bits", 0)) for p in plan.parameters
        ]
        return [each.rotates_in for each in layout.segments]

    assert found(a_plan()) == found(a_plan(), is_local=True) == [256, 0, 0, 256]
    assert found(a_plan(), least_bits=6) == [256, 0, 0, 256]
    assert found(a_plan(), least_bits=7) == found(a_plan(grad_rotation="none")) == [0] * 4
    assert found(a_plan(budget=5, bucket_size=64)) == [64, 64, 0, 64]
    assert found(a_plan(budget=5), least_bits=8) == [1024, 1024, 0, 0]


def test_a_rotation_is_part_of_what_payloads_are_checked_by() -> None:
    one, other = (a_plan(grad_rotation=how) for how in ("none", "hadamard"))
    headers = [plan.reduce((0, 3), torch.float32).header(0, 0) for plan in (one, other)]
    assert headers[0][:3] == headers[1][:3]
    assert headers[0][3] != headers[1][3]
