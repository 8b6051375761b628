"""Which parameters the wire takes for embeddings and heads, and what tied ones are called."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

import qsdp
from qsdp.comm.plan import embedding_names, tied_names


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
            ValueError, match=r"'head\.weight', which is tied to 'embed.weight'; use"
        ):
            config.check_policy(names, tied_names(model))
    qsdp.QSDPConfig(policy=(("*.weight", 4),)).check_policy(names, tied_names(model))
