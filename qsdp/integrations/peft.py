"""peft: the quantized wire for LoRA and other adapters, whose frozen base crosses it once."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from peft.tuners.adaption_prompt.model import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

import qsdp
from qsdp.compat.parameter_names import named_parameters
from qsdp.sparsity.prunable import prunable_parameters

ADAPTER_BITS = 8
_DEFAULTS: dict[str, Any] = {"weight_bits": 4, "gather": "once"}
_INNER: dict[str, tuple[type, ...]] = {
    "base_model": (PeftModel, PeftMixedModel),
    "model": (BaseTuner, AdaptionPromptModel, AdaptedAttention, AdaptedAttentionGPT),
    "base_layer": (BaseTunerLayer,),
    "original_module": (AuxiliaryTrainingWrapper,),
}
"""What peft puts around a part of a model, by the name that the part has in there."""


def wire(model: nn.Module, **settings: Any) -> qsdp.QSDPConfig:
    """Choose a wire for adapters: a base at 4 bits, gathered once while it is frozen, they at 8.

    Adapters are what peft has added, and whatever is trained. Those of two dimensions or more
    travel at 8 bits, weights and gradients: their rank is what they have few of. Others travel as
    they are, as norms and biases do.

    Args:
        model: With adapters, sharded or not yet.
        settings: Of ``QSDPConfig``, in place of the defaults here; a ``policy`` goes before the
            patterns of adapters.

    Raises:
        ValueError: The model has no adapters; or as ``QSDPConfig``.
    """
    adapters = _adapters(model)
    config = qsdp.QSDPConfig(**(_DEFAULTS | settings))
    coded = [name for name, p in adapters.items() if p.ndim > 1 and p.is_floating_point()]
    left = [name for name in coded if config.bits_by_policy(name) is None]
    own = tuple((pattern, ADAPTER_BITS) for pattern in _patterns(left, model, adapters))
    return qsdp.QSDPConfig(**(_DEFAULTS | settings | {"policy": (*config.policy, *own)}))


def base_weights(model: nn.Module) -> list[str]:
    """Name patterns of the base's prunable weights, without adapters: a ``prunable`` set.

    ``CrAM`` compresses them in its second pass, whether they are frozen or not, and trains the
    adapters to go with what is left. ``ACDC`` and ``GMP`` prune nothing that is frozen.

    Args:
        model: With adapters, sharded or not yet.

    Raises:
        ValueError: The model has no adapters, or no such weights.
    """
    adapters = _adapters(model)
    return _patterns([n for n in prunable_parameters(model) if n not in adapters], model, adapters)


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that peft has added to ``model``, or that are trained, by name."""
    wrappers = [
        (module, getattr(module, inner))
        for module in model.modules()
        for inner, kinds in _INNER.items()
        if isinstance(module, kinds)
    ]
    added: set[nn.Parameter] = set()
    for wrapper, inner in wrappers:
        added |= {*wrapper.parameters()} - {*inner.parameters()}
    named = named_parameters(model)
    adapters = {name: p for name, p in named.items() if p.requires_grad or p in added}
    if not adapters or not wrappers:
        raise ValueError(
            f"{type(model).__name__} has no adapters: give what peft.get_peft_model has returned."
        )
    return adapters


def _patterns(
    names: Collection[str], model: nn.Module, adapters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Patterns of ``names``, one for all layers where that matches nothing else of ``model``."""
    others = named_parameters(model).keys() - {*names}
    found: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        is_theirs = not any(fnmatchcase(other, pattern) for other in others)
        found[pattern if is_theirs else name] = None
    return [*found]
