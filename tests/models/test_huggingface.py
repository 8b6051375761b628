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
