"""A checksum tells every edit that training makes of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from qsdp.common import checksum as module

SIZES = [2, 3, 7, 1000, 3001]


@pytest.fixture(params=["on CPUs", "elsewhere"])
def checksum(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checksum]:
    """What serves CPUs, and what serves GPUs, here on the CPU with chunks of 1024 words."""
    if request.param == "on CPUs":
        yield module.checksum
        return
    monkeypatch.setattr(module, "_CHUNK", 1024)
    module._factors.cache_clear()

    def of(tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            total = module._add_on_device(total, raw)
        return total

    yield of
    module._factors.cache_clear()


Checksum = Callable[[Iterable[Tensor]], int]


def _values(size: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(size)
    return torch.randn(size).to(dtype)


def _swap_halves(tensor: Tensor) -> None:
    tensor.copy_(tensor.roll(tensor.numel() // 2))


def _flip_two_signs(tensor: Tensor) -> None:
    tensor[[0, -1]] *= -1


EDITS: dict[str, Callable[[Tensor], object]] = {
    "first": lambda tensor: tensor[:1].add_(1),
    "last": lambda tensor: tensor[-1:].add_(1),
    "sign": lambda tensor: tensor[-1:].neg_(),
    "two signs": _flip_two_signs,
    "all signs": Tensor.neg_,
    "halved": lambda tensor: tensor.mul_(0.5),
    "swapped": _swap_halves,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("size", SIZES)
def test_an_edit_is_told(checksum: Checksum, dtype: torch.dtype, edit: str, size: int) -> None:
    tensor = _values(size, dtype)
    before, same = checksum([tensor]), checksum([tensor.clone()])
    assert before == same
    EDITS[edit](tensor)
    assert checksum([tensor]) != before


def test_every_bit_counts(checksum: Checksum) -> None:
    words = torch.arange(70, dtype=torch.int32)
    found = {checksum([words])}
    for place in range(words.numel()):
        for bit in range(32):
            changed = words.clone()
            changed[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            found.add(checksum([changed]))
    assert len(found) == 1 + 70 * 32


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_shards_may_lie_anywhere_and_be_of_any_type(checksum: Checksum, start: int) -> None:
    whole = torch.arange(64, dtype=torch.uint8)
    assert checksum([whole[start:]]) == checksum([whole[start:].clone()])
    assert checksum([whole.view(8, 8).T]) == checksum([whole.view(8, 8).T.contiguous()])
    assert checksum([whole > 3]) != checksum([whole > 4])
    assert checksum([]) == checksum([torch.empty(0)]) == 0
