"""Promises of the way from and to Hugging Face checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsdp.models.huggingface.config import config_from_huggingface
from qsdp.models.huggingface.weights import (
    export_huggingface,
    load_huggingface,
    load_huggingface_weights,
)
from tests.support.huggingface_models import our_model, their_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint, for tests to damage."""
    export_huggingface(our_model(), tmp_path)
    return tmp_path


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_computes_the_same_logits(tmp_path: Path, tied: bool) -> None:
    theirs = their_model(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ours = load_huggingface(tmp_path)
    assert ours.config.tie_weights == tied
    tokens = torch.randint(13, (4, 6))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_in_several_files_loads(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(13, (4, 6))
    ours = load_huggingface(tmp_path)
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_the_bare_model_loads(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.transformer.save_pretrained(tmp_path)
    tokens = torch.randint(13, (4, 6))
    ours = load_huggingface(tmp_path)
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_an_exported_model_computes_the_same_logits_there(
    tmp_path: Path, bias: bool, tie_weights: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = our_model(bias=bias, tie_weights=tie_weights)
    export_huggingface(ours, tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), "every tensor is known and none is missing"
    tokens = torch.randint(13, (4, 6))
    torch.testing.assert_close(ours(tokens)[0], theirs.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_export_and_load_give_back_every_bit(tmp_path: Path, tie_weights: bool) -> None:
    ours = our_model(tie_weights=tie_weights)
    export_huggingface(ours, tmp_path / "new" / "folder")
    again = load_huggingface(tmp_path / "new" / "folder")
    assert again.config == ours.config
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "nothing"}, "type 'nothing', but only .*'gpt2'"),
        ({"activation_function": "relu"}, "activation_function to 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon to 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx to True"),
        ({"n_inner": 24}, "n_inner to 24"),
    ],
)
def test_a_model_of_another_function_is_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    edit_config(folder, **settings)
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        load_huggingface(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="lacks the setting 'n_embd'"):
        load_huggingface(tmp_path)


def test_missing_damaged_and_incomplete_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"no tensor for parameter blocks\.1\.mlp\.up\.bias"):
        load_huggingface(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_huggingface(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"there is no .*model\.safetensors"):
        load_huggingface(folder)


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"wte.weight.* has shape \[13, 8\].* needs \[14, 8\]"):
        load_huggingface_weights(our_model(vocab_size=14), folder)


def test_export_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        export_huggingface(our_model(), tmp_path / "taken")


@pytest.mark.parametrize("listed", [{"a": "config.json", "b": "../other", "c": 7}, ["a"], None])
def test_an_index_names_nothing_that_an_export_deletes(folder: Path, listed: object) -> None:
    (folder.parent / "other").write_text("")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_text("")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    ours = our_model()
    export_huggingface(ours, folder)
    assert (folder.parent / "other").exists()
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    again = load_huggingface(folder)
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_an_export_takes_no_place_that_is_taken(folder: Path) -> None:
    with pytest.raises(ValueError, match="something else than a model of this configuration"):
        export_huggingface(our_model(width=16), folder)
    for name in ("../out.txt", "model.safetensors", "config.json", "", "a/b"):
        with pytest.raises(ValueError, match="files holds"):
            export_huggingface(our_model(), folder, files={name: "text"})
    export_huggingface(our_model(), folder, files={"tokenizer.json": "{}"})
    assert (folder / "tokenizer.json").read_text() == "{}"


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | added, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.2.ln_1.bias",
        "score.weight",
        "transformer.h.0.attn.c_attn.scale",
        "wte.weight",
    ],
)
def test_a_tensor_that_would_be_lost_is_refused(folder: Path, name: str) -> None:
    add_tensors(folder, **{name: torch.randn(2, 3)})
    with pytest.raises(ValueError, match=f"{name}, which would be lost, as the model has no such"):
        load_huggingface(folder)


def test_a_config_of_fewer_layers_than_are_there_is_refused(folder: Path) -> None:
    edit_config(folder, n_layer=1)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\..* and 9 more, which would be lost"):
        load_huggingface(folder)


@pytest.mark.parametrize("is_bare", [True, False])
def test_tensors_that_change_nothing_are_left_out(tmp_path: Path, is_bare: bool) -> None:
    export_huggingface(ours := our_model(), tmp_path)
    prefix = "" if is_bare else "transformer."
    path = tmp_path / "model.safetensors"
    stored = {
        name.removeprefix("transformer." if is_bare else ""): tensor
        for name, tensor in load_file(path).items()
    }
    for layer in range(2):
        # As versions of the library before 4.30 saved them.
        stored[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 6, 6).tril().bool()
        stored[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    stored["lm_head.weight"] = stored[f"{prefix}wte.weight"].clone()
    save_file(stored, path, metadata={"format": "pt"})
    again = load_huggingface(tmp_path)
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    for other in (stored["lm_head.weight"] + 1, stored["lm_head.weight"].double()[:3]):
        add_tensors(tmp_path, lm_head__weight=other)
        with pytest.raises(ValueError, match=r"lm_head\.weight, which would be lost"):
            load_huggingface(tmp_path)


@pytest.mark.parametrize("is_bare", [True, False])
def test_biases_are_left_out_only_where_they_are_zeros(tmp_path: Path, is_bare: bool) -> None:
    export_huggingface(ours := our_model(bias=False), tmp_path)
    path = tmp_path / "model.safetensors"
    prefix = "transformer." if is_bare else ""
    stored = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(stored, path, metadata={"format": "pt"})
    again = our_model(bias=False)
    load_huggingface_weights(again, tmp_path)
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    name = next(name for name in stored if name.endswith("h.1.mlp.c_fc.bias"))
    stored[name][5] = 1e-3
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}, which would be lost"):
        load_huggingface_weights(again, tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_codes_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    name = "transformer.h.1.mlp.c_fc.bias"
    add_tensors(folder, **{name: torch.zeros(32).to(dtype)})
    with pytest.raises(ValueError, match=f"tensor {name} in .* is of dtype"):
        load_huggingface(folder)
