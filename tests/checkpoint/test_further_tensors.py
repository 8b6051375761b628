"""What a checkpoint keeps beside model and optimizer is as it was saved, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from qsdp import checkpoint
from tests.support.linear_model import make, take_step

pytestmark = pytest.mark.usefixtures("gloo_of_one")


def further() -> dict[str, Tensor]:
    """Tensors of all kinds that are kept: sharded and plain ones, NaN, integers, none at all."""
    mesh = init_device_mesh("cpu", (1,))
    low = torch.randn(7)
    low[2] = torch.nan
    return {
        "block.weight.min": DTensor.from_local(low, mesh, [Shard(0)]),
        "block.weight.epoch": DTensor.from_local(
            torch.randint(9, (7,), dtype=torch.int32), mesh, [Shard(0)]
        ),
        "plain": torch.randn(2, 3, dtype=torch.float64),
        "empty": DTensor.from_local(torch.empty(0), mesh, [Shard(0)]),
    }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 3) for name, tensor in tensors.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.allclose(local(ours[n]), local(theirs[n]), rtol=0, atol=0, equal_nan=True)
        for n in ours
    )


@pytest.fixture(params=["at once", "beside"])
def save(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Either way of saving; what is saved is changed before it is waited for."""
    if request.param == "at once":
        yield checkpoint.save
        return
    with checkpoint.AsyncSaver() as saver:

        def save_beside(*arguments: Any, tensors: dict[str, Tensor]) -> Path | None:
            given = {name: tensor.clone() for name, tensor in tensors.items()}
            saver.save(*arguments, tensors=given)
            for tensor in given.values():
                local(tensor).fill_(5)
            return saver.wait()

        yield save_beside


def test_further_tensors_are_read_into_those_of_their_names(tmp_path: Path, save: Any) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    tensors = further()
    path = save(tmp_path, 1, model, optimizer, {}, tensors=tensors)
    found = blank(tensors)
    held = {name: local(tensor) for name, tensor in found.items()}
    checkpoint.load_tensors(path, found)
    assert same(found, tensors)
    assert same(held, tensors)  # in place
    some = blank({name: tensors[name] for name in ("plain", "block.weight.min")})
    checkpoint.load_tensors(path, some, is_checked=True)
    assert same(some, {name: tensors[name] for name in some})
    # Who reads the rest meets none of it.
    other, other_optimizer = make()
    checkpoint.load(path, other, other_optimizer)
    checkpoint.load_model(path, nn.Linear(*reversed(other.weight.shape)))
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(checkpoint.TensorReader(path).read("weight"), model.weight)


def test_they_have_names_of_their_own(tmp_path: Path) -> None:
    model, optimizer = make()
    tensors = {"weight": torch.zeros(3), "model.weight": torch.ones(2)}
    path = checkpoint.save(tmp_path, 1, model, optimizer, {}, tensors=tensors)
    other, other_optimizer = make()
    checkpoint.load(path, other, other_optimizer)
    assert torch.equal(other.weight, model.weight)
    found = blank(tensors)
    checkpoint.load_tensors(path, found)
    assert same(found, tensors)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"other": torch.zeros(7)}, "has nothing of other beside model and optimizer"),
        ({"plain": torch.zeros(3, 2)}, r"torch\.float32 of shape \(2, 3\), but .* \(3, 2\)"),
        ({"plain": torch.zeros(2, 3, dtype=torch.int32)}, r"float32 of .*, but torch\.int32"),
        ({"plain": 1}, "tensors is .*: give tensors by name"),
        ([torch.zeros(2)], "tensors is .*: give tensors by name"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_read(
    tmp_path: Path, asked: Any, words: str
) -> None:
    path = checkpoint.save(tmp_path, 1, *make(), {}, tensors={"plain": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=words) as raised:
        checkpoint.load_tensors(path, asked)
    assert str(raised.value).endswith(".")
    for tensor in asked.values() if isinstance(asked, dict) else ():
        assert not isinstance(tensor, Tensor) or not tensor.any()


def test_a_checkpoint_without_any_says_so(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, *make(), {})
    checkpoint.load_tensors(path, {})
    with pytest.raises(ValueError, match="has nothing of weight beside"):
        checkpoint.load_tensors(path, {"weight": torch.zeros(1)})


@pytest.mark.parametrize("tensors", [{"a": 1.0}, {1: torch.zeros(1)}, torch.zeros(1)])
def test_what_is_no_tensor_by_name_is_not_saved(tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(ValueError, match=r"tensors is .*: give tensors by name"):
        checkpoint.save(tmp_path, 1, *make(), {}, tensors=tensors)
    assert not [*tmp_path.iterdir()]


def test_damage_to_them_is_found_before_they_are_read(tmp_path: Path) -> None:
    tensors = {"plain": torch.ones(64)}
    path = checkpoint.save(tmp_path, 1, *make(), {}, tensors=tensors)
    (file,) = path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    at = data.find(torch.ones(64).numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    file.write_bytes(data)
    found = blank(tensors)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load_tensors(path, found)
    assert same(found, blank(tensors))
