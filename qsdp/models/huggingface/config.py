"""The config.json of a Hugging Face GPT-2, as our GPTConfig and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.load_safetensors import read_json

# Settings that change the function which a checkpoint's weights compute, with the only values
# that our GPT computes. The first value is the one that Hugging Face assumes when it is absent.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def config_from_huggingface(folder: str | Path) -> GPTConfig:
    """The GPTConfig of the GPT-2 checkpoint in `folder` (dropout 0, whatever it was trained with).

    Raises ValueError when `folder` has no readable config.json, or one that is not a GPT-2 whose
    function our GPT computes.
    """
    path = Path(folder) / "config.json"
    settings = read_json(path)
    if settings.get("model_type") != "gpt2":
        raise ValueError(
            f"{path} describes a model of type {settings.get('model_type')!r}, but only 'gpt2' "
            "can be loaded: choose a GPT-2 checkpoint."
        )
    for name, allowed in _SUPPORTED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} sets {name} to {settings[name]!r}, but only {list(allowed)} can be "
                "loaded: choose another checkpoint."
            )
    try:
        width = settings["n_embd"]
        config = GPTConfig(
            vocab_size=settings["vocab_size"],
            num_layers=settings["n_layer"],
            num_heads=settings["n_head"],
            width=width,
            context=settings["n_positions"],
            tie_weights=settings.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise ValueError(
            f"{path} lacks the setting {error}: choose a complete GPT-2 checkpoint."
        ) from None
    if settings.get("n_inner") not in (None, 4 * width):
        raise ValueError(
            f"{path} sets n_inner to {settings['n_inner']}, but only 4 n_embd = {4 * width} can "
            "be loaded: choose another checkpoint."
        )
    return config


def size_of(config: GPTConfig) -> dict[str, Any]:
    return their_config(replace(config, dropout=0.0))


def their_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.width,
        "n_positions": config.context,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_weights,
        # GPT-2's end-of-text token is the last of its vocabulary. Hugging Face's default, 50256,
        # would lie outside a smaller one.
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        **{name: allowed[0] for name, allowed in _SUPPORTED.items()},
    }
