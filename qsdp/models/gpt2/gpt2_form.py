"""GPT-2 as the transformers library keeps it. No torch here.

It keeps GPT-2's linears as Conv1D, [in, out]; ours are nn.Linear, [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.transformers_form import Shape, TransformersForm

_VOCABULARY = 50257
# Settings that change the function which a checkpoint's weights compute, with the only values
# that our GPT computes. The first value is the one that Hugging Face assumes when it is absent.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_BLOCK_MODULES = {
    "norm_attn": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "norm_mlp": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_ROOT_MODULES = {
    "embed": "transformer.wte",
    "position": "transformer.wpe",
    "norm_out": "transformer.ln_f",
    "head": "lm_head",
}


class GPT2Form(TransformersForm[GPTConfig]):
    """GPT2LMHeadModel's config.json and tensors.

    A model without biases gets zero ones, which compute the same.
    """

    model_type = "gpt2"
    base_prefix = "transformer."
    buffers = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
    tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def size(self, settings: Mapping[str, Any], path: Path) -> GPTConfig:
        """The size of a GPT2LMHeadModel with these settings. Raises as ``TransformersForm``."""
        for name, allowed in _SUPPORTED.items():
            if settings.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"{path} sets {name} to {settings[name]!r}, but only {list(allowed)} can be "
                    "loaded: choose another checkpoint."
                )
        width = settings["n_embd"]
        config = GPTConfig(
            vocab_size=settings["vocab_size"],
            num_layers=settings["n_layer"],
            num_heads=settings["n_head"],
            width=width,
            context=settings["n_positions"],
            tie_weights=settings.get("tie_word_embeddings", True),
        )
        if settings.get("n_inner") not in (None, 4 * width):
            raise ValueError(
                f"{path} sets n_inner to {settings['n_inner']}, but only 4 n_embd = {4 * width} "
                "can be loaded: choose another checkpoint."
            )
        return config

    def settings(self, size: GPTConfig) -> dict[str, Any]:
        """The config.json of a GPT2LMHeadModel."""
        # The last token of GPT-2's own vocabulary ends a text. In another it may be any character,
        # at which ``generate`` would stop.
        end_of_text = _VOCABULARY - 1 if size.vocab_size == _VOCABULARY else None
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": size.vocab_size,
            "n_layer": size.num_layers,
            "n_head": size.num_heads,
            "n_embd": size.width,
            "n_positions": size.context,
            "n_inner": None,
            "embd_pdrop": size.dropout,
            "attn_pdrop": size.dropout,
            "resid_pdrop": size.dropout,
            "tie_word_embeddings": size.tie_weights,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            **{name: allowed[0] for name, allowed in _SUPPORTED.items()},
        }

    def tensor_name(self, parameter: str) -> tuple[str, bool]:
        """The tensor that keeps a parameter; Conv1D keeps it transposed."""
        module, _, kind = parameter.rpartition(".")
        if module in _ROOT_MODULES:
            return f"{_ROOT_MODULES[module]}.{kind}", False
        _, index, inner = module.split(".", 2)
        transposed = kind == "weight" and not inner.startswith("norm")
        return f"transformer.h.{index}.{_BLOCK_MODULES[inner]}.{kind}", transposed

    def zero_tensors(self, size: GPTConfig, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The biases of a model that has none."""
        if size.bias:
            return {}
        return {
            name.removesuffix("weight") + "bias": shape[-1:]
            for name, shape in shapes.items()
            if name.startswith(("transformer.h.", "transformer.ln_f."))
        }
