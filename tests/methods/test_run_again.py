"""What a second pass has in common with the first of its micro-batch, and what it counts not."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from qsdp.methods.cram.run_again import MicroBatches, counting_aside

CPU = torch.device("cpu")


class Pair(NamedTuple):
    ids: Tensor
    name: str


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    more: dict[str, Any]


@dataclass
class Slotted:
    __slots__ = ("ids",)
    ids: Tensor


def ones() -> Tensor:
    return torch.ones(3)


INPUTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "tensor": (ones, lambda batch: batch),
    "array": (lambda: np.ones(3), lambda batch: torch.from_numpy(batch)),
    "list in a tuple": (lambda: ([ones()], 1), lambda batch: batch[0][0]),
    "named tuple": (lambda: Pair(ones(), "a"), lambda batch: batch.ids),
    "dictionary": (lambda: {"a": {"ids": ones()}}, lambda batch: batch["a"]["ids"]),
    "mapping": (lambda: UserDict(ids=ones()), lambda batch: batch["ids"]),
    "frozen dataclass": (lambda: Batch(ones(), {}), lambda batch: batch.ids),
    "in a dataclass": (lambda: Batch(ones(), {"a": [ones()]}), lambda batch: batch.more["a"][0]),
    "dataclass with slots": (lambda: Slotted(ones()), lambda batch: batch.ids),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_a_loss_edits_are_whole_again(kind: str) -> None:
    make, tensor_of = INPUTS[kind]
    batches, seen = MicroBatches(), []

    def run() -> None:
        tensor = tensor_of(batches.prepared(make, CPU))
        seen.append(tensor.tolist())
        tensor.mul_(2)

    batches.first(run, lambda: None)
    batches.again(lambda is_last: None, CPU)
    assert seen == [[1, 1, 1]] * 2


def test_a_pass_whose_inputs_were_not_prepared_is_refused() -> None:
    batches = MicroBatches()
    with pytest.raises(RuntimeError, match=r"call super\(\)\._prepare_inputs\(inputs\)"):
        batches.first(lambda: None, lambda: None)


class Accumulating(torch.optim.SGD):
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As Accelerate's do between micro-batches."""


def test_a_step_that_is_given_up_leaves_no_gradients_whatever_its_optimizer_clears() -> None:
    model, batches = torch.nn.Linear(2, 2), MicroBatches()
    optimizer = Accumulating(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    batches.give_up(model, optimizer)
    assert [parameter.grad for parameter in model.parameters()] == [None, None]


class WriteOnce(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise KeyError(key)
        super().__setitem__(key, value)


class Counter:
    def __init__(self) -> None:
        self.number, self.loss, self.seen = 1, torch.zeros(()), {1}
        self.metrics = defaultdict(list, loss=[0.5])
        self.nested: Any = {"train": {"tokens": [torch.zeros(2)]}}
        self.logs: Any = OrderedDict(texts=deque([1], maxlen=2))
        self.circle: list[Any] = [1]
        self.circle.append(self.circle)

    def count(self) -> None:
        self.number += 1
        self.loss += 1
        self.seen.add(self.number)
        self.metrics["loss"].append(1.0)
        self.metrics["new"].append(1.0)
        self.nested["train"]["tokens"][0] += 1
        self.logs["texts"].append(2)
        assert self.circle[1] is self.circle
        self.circle.append(2)

    def counts(self) -> str:
        return str(vars(self))


def test_what_is_counted_inside_is_as_if_it_were_not() -> None:
    counter = Counter()
    before = counter.counts()
    with counting_aside(counter):
        counter.count()
        assert counter.counts() != before
    assert counter.counts() == before
    counter.count()
    assert counter.circle[1] is counter.circle


def test_what_is_large_or_takes_no_items_is_left_where_it_is() -> None:
    counter: Any = Counter()
    counter.table, counter.array = torch.zeros(1 << 17), np.zeros(1 << 17)
    counter.rows, counter.once = [[0]] * (1 << 17), WriteOnce(a=[1])
    counter.train_dataset = [{"ids": ones()}]
    names = ("table", "array", "once", "train_dataset")
    before = [id(getattr(counter, name)) for name in names]
    with counting_aside(counter):
        assert [id(getattr(counter, name)) for name in names] == before
        counter.once["b"] = 2
        counter.rows.append([1])
    assert len(counter.rows) == 1 << 17
    assert counter.once == {"a": [1], "b": 2}
