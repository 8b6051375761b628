"""Weights that no run has written are refused by name, unless they can be written without loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qsdp import checkpoint
from qsdp.export import export_compressed, export_transformers, load_export
from qsdp.models.gpt2.model import GPT
from qsdp.sparsity.compression_target import Compression
from tests.support.exports import edit_tensors, small_export
from tests.support.small_gpt import SIZE, save_model

pytestmark = pytest.mark.usefixtures("gloo_of_one")
NAME = "blocks.1.attn.qkv.weight"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return small_export(tmp_path)


def refused_by_both(export: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        export_transformers(export, SIZE, export.parent / "out", **options)
    assert not (export.parent / "out").exists()
    with pytest.raises(ValueError, match=match):
        load_export(export, GPT(SIZE))


@pytest.mark.parametrize("name", ["head.weight", "blocks.3.norm_mlp.bias", "scale", "lm_head.bias"])
def test_a_tensor_that_would_be_lost_is_refused(export: Path, name: str) -> None:
    edit_tensors(export, lambda tensors: tensors.update({name: torch.randn(11, 16)}))
    refused_by_both(export, f"{name}, which would be lost, as the model has no such parameter")


def test_a_smaller_model_than_was_saved_is_refused(export: Path) -> None:
    smaller = replace(SIZE, num_layers=1)
    run = export.parent / "checkpoints" / "step-00000007"
    lost = r"holds blocks\.1.* and 21 more, which would be lost"
    for source in (export, run):
        with pytest.raises(ValueError, match=lost):
            export_transformers(source, smaller, export.parent / "out")
    with pytest.raises(ValueError, match=lost):
        load_export(export, GPT(smaller))
    with pytest.raises(ValueError, match=lost):
        export_compressed(run, smaller, Compression(sparsity=0.5), export.parent / "out")


@pytest.mark.parametrize("shape", [(48, 8), (16, 48), (768,), ()])
def test_a_tensor_of_another_shape_is_refused(export: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(export, lambda tensors: tensors.update({NAME: torch.randn(shape)}))
    refused_by_both(export, NAME.replace(".", r"\."))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
@pytest.mark.parametrize("chosen", [None, torch.float32])
def test_codes_are_no_weights(export: Path, dtype: torch.dtype, chosen: torch.dtype | None) -> None:
    edit_tensors(export, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"{NAME} as {said}, but weights are written as float32"):
        export_transformers(export, SIZE, export.parent / "out", dtype=chosen)
    with pytest.raises(ValueError, match=f"tensor {NAME} in .* is of dtype"):
        load_export(export, GPT(SIZE))


@pytest.mark.parametrize("chosen", [torch.uint8, torch.float64, torch.bool, torch.float8_e5m2])
def test_weights_are_written_in_no_other_dtype(export: Path, chosen: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype is {chosen}: choose one of float32, bfloat16"):
        export_transformers(export, SIZE, export.parent / "out", dtype=chosen)


def test_fp64_is_cast_where_that_is_asked_for(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({NAME: tensors[NAME].double()}))
    out = export.parent / "out"
    with pytest.raises(ValueError, match=f"{NAME} as float64, .*: choose one of these"):
        export_transformers(export, SIZE, out)
    export_transformers(export, SIZE, out, dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
        torch.float32
    }


def test_a_checkpoint_of_fp64_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, GPT(SIZE).double(), None, {})
    for write in (
        lambda: export_compressed(path, SIZE, Compression(sparsity=0.5), tmp_path / "out"),
        lambda: export_transformers(path, SIZE, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"embed\.weight as float64, but weights are written"):
            write()


@pytest.mark.parametrize("is_first", [True, False])
def test_of_several_dtypes_the_widest_is_written_and_named(export: Path, is_first: bool) -> None:
    """Under both names: the library's older versions know the second one alone."""
    first = "embed.weight"

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if (name == first) == is_first:
                tensors[name] = tensors[name].bfloat16()

    edit_tensors(export, narrow)
    before, out = load_file(export / "model.safetensors"), export.parent / "out"
    settings = export_transformers(export, SIZE, out)
    assert json.loads((out / "config.json").read_text()) == settings
    assert settings["dtype"] == settings["torch_dtype"] == "float32"
    written = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(written["transformer.wte.weight"], before[first].float())
    half = export.parent / "half"
    settings = export_transformers(export, SIZE, half, dtype=torch.float16)
    assert settings["dtype"] == settings["torch_dtype"] == "float16"


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_the_largest_weight_that_a_dtype_cannot_hold_is_named(tmp_path: Path, odd: float) -> None:
    model = save_model(tmp_path)
    with torch.no_grad():
        model.norm_out.bias[:4] = torch.tensor([70000.0, odd, -1.25e6, odd])
    path = checkpoint.save(tmp_path, 9, model, None, {})
    with pytest.raises(ValueError, match=r"norm_out\.bias has a weight of magnitude 1\.25e\+06"):
        export_transformers(path, SIZE, tmp_path / "out", dtype=torch.float16)
    model.norm_out.bias.data[[0, 2]] = 1.0  # what is not finite stays so
    path = checkpoint.save(tmp_path, 10, model, None, {})
    export_transformers(path, SIZE, tmp_path / "out", dtype=torch.float16)
    stored = load_file(tmp_path / "out" / "model.safetensors")["transformer.ln_f.bias"]
    torch.testing.assert_close(stored[1].item(), odd, equal_nan=True)
