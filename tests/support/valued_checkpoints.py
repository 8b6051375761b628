"""Checkpoints of which each tells by its weights and moments which one it is."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from qsdp import checkpoint
from tests.support.file_operations import tree

_VALUES: dict[tuple[tuple[str, bytes | None], ...], float] = {}
TOKENIZER = {"tokenizer.json": '{"kind": "byte"}\n'}


def model_of(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose weights and moments tell which one it is."""
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(value + number)
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return model, optimizer


def save(root: Path, step: int, value: float, keep: int = 2) -> None:
    meta = {"value": value}
    checkpoint.save(root, step, *model_of(value), meta, files=TOKENIZER, keep=keep)


def save_beside(root: Path, step: int, value: float, keep: int = 2) -> None:
    with checkpoint.AsyncSaver() as saver:
        saver.save(root, step, *model_of(value), {"value": value}, files=TOKENIZER, keep=keep)


def value_of(path: Path) -> float:
    """Which model is at ``path``, all of it bit for bit."""
    content = tuple(sorted(tree(path).items()))
    if content not in _VALUES:
        _VALUES[content] = _loaded(path)
    return _VALUES[content]


def _loaded(path: Path) -> float:
    checkpoint.verify(path)
    assert (path / "tokenizer.json").read_text() == TOKENIZER["tokenizer.json"]
    value = checkpoint.read_meta(path)["value"]
    (model, optimizer), (expected, expected_optimizer) = model_of(math.pi), model_of(value)
    checkpoint.load(path, model, optimizer)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        own, other = optimizer.state[ours], expected_optimizer.state[theirs]
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
    return value


def values(root: Path) -> dict[str, float]:
    return {path.name: value_of(path) for path in sorted(root.iterdir())}
