"""What a plan keeps, and which parameters the wire takes for embeddings and heads."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any, cast

import pytest
import torch
from torch import nn

import qsdp
from qsdp.codec.segment_table import Field
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Parameter, Plan
from qsdp.comm.policy_checks import check_policy
from qsdp.common.model_structure import embedding_names, tied_names


class Model(nn.Module):
    """GPT's parts: the MLP is as wide as the context, the attention as the vocabulary."""

    def __init__(self, vocab_size: int, context: int, width: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Linear(width, context),
                    "qkv": nn.Linear(width, vocab_size),
                    "more": nn.Sequential(nn.Linear(width, context), nn.GELU()),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("context", [8, 13, 64])
def test_a_head_has_as_many_outputs_as_some_table_has_rows_and_is_outside_the_blocks(
    context: int,
) -> None:
    tables = {"embed.weight", "position.weight"}
    model = Model(13, context, 8)
    assert embedding_names(model) == tables | {"head.weight"}
    assert embedding_names(Model(13, context, 8, tied=True)) == tables
    wrapped = nn.Sequential(model, nn.LogSoftmax(-1))
    assert embedding_names(wrapped) == {f"0.{name}" for name in tables | {"head.weight"}}


def test_a_model_of_layers_in_a_row_and_one_without_embeddings() -> None:
    layers = [nn.Embedding(13, 8), nn.Sequential(nn.Linear(8, 13)), nn.Linear(8, 13)]
    assert embedding_names(nn.Sequential(*layers)) == {"0.weight", "2.weight"}
    assert embedding_names(nn.Sequential(OrderedDict(a=nn.Linear(8, 13)))) == set()


def test_a_policy_that_names_a_tied_parameter_by_its_second_name_is_told_the_first() -> None:
    model = Model(13, 8, 8, tied=True)
    assert tied_names(model) == {"head.weight": "embed.weight"}
    assert tied_names(Model(13, 8, 8)) == {}
    names = [name for name, _ in model.named_parameters()]
    for pattern in ("head.weight", "head*"):
        config = qsdp.QSDPConfig(policy=((pattern, 4),))
        with pytest.raises(
            ValueError, match=r"'head\.weight', which is tied to 'embed.weight': use"
        ):
            check_policy(config, names, tied_names(model))
    check_policy(qsdp.QSDPConfig(policy=(("*.weight", 4),)), names, tied_names(model))


class Ranks:
    """What a plan asks of a process group."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def size(self) -> int:
        return self._num_ranks

    def rank(self) -> int:
        return 1


def a_plan(num_ranks: int, num_parameters: int = 8) -> Plan:
    parameters = [
        Parameter(
            name=f"weight {i}",
            index=i,
            shape=torch.Size([7 + i, 5]),
            dtype=torch.float32,
            shard_dim=0,
            weight_bits=8 if i % 2 else 32,
            grad_bits=4,
            keeps_bits=False,
            why="",
        )
        for i in range(num_parameters)
    ]
    return Plan(parameters, 3, cast(Any, Ranks(num_ranks)), qsdp.QSDPConfig())


def _same(one: GroupLayout, other: GroupLayout) -> bool:
    pairs = ((one.tables, other.tables), (one.fp32_tables, other.fp32_tables))
    return one.header(0, 0) == other.header(0, 0) and all(torch.equal(*pair) for pair in pairs)


def test_sets_of_gradients_that_change_with_every_step_are_not_all_kept() -> None:
    plan = a_plan(3)
    frozen, whole = plan.gather((0, 1), is_frozen=True), plan.gather(plan.places)
    draw, sets = random.Random(0), {tuple(range(8))}
    while len(sets) < 100:
        sets.add(tuple(sorted(draw.sample(range(8), draw.randrange(1, 8)))))
    for places in sets:
        layout = plan.reduce(places, torch.float32)
        assert plan.reduce(places, torch.float32) is layout
        assert _same(layout, a_plan(3).reduce(places, torch.float32))
    assert len(plan._layouts) < 50
    # Payloads that are kept of the same layouts are still of these.
    assert plan.gather((0, 1), is_frozen=True) is frozen
    for places in sets - {plan.places}:
        layout = plan.gather(places)
        assert _same(layout, a_plan(3).gather(places))
        assert plan.gather((0, 1), is_frozen=True) is frozen
    assert len(plan._layouts) < 100
    assert _same(plan.gather(plan.places), whole)


@pytest.mark.parametrize("num_ranks", [2, 40])
def test_ranks_with_equal_slices_share_a_table(num_ranks: int) -> None:
    plan = a_plan(num_ranks)
    for layout in (plan.gather((2, 5)), plan.reduce((1, 4), torch.bfloat16)):
        assert len(layout.tables) == len(layout.fp32_tables) <= 4  # full, two ragged ones, empty
        chosen = (2, 5) if layout.tables[0, 0, Field.PARAMETER] == 2 else (1, 4)
        for rank in range(num_ranks):
            numels = [plan.parameters[i].shard_numel(rank, num_ranks) for i in chosen]
            assert layout.table(rank)[:, Field.NUMEL].tolist() == numels
    starts = [0]
    for p in plan.parameters:
        starts.append(starts[-1] + 4 * p.padded_numel(num_ranks))
    for table in plan.gather((2, 5)).tables:
        assert table[:, Field.BUFFER_BYTE].tolist() == [starts[2], starts[5]]
