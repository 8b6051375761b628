"""GPT-2 as the trainer, the export and the commands see it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.gpt2_form import GPT2Form
from qsdp.models.gpt2.presets import PRESETS, TRAINING
from qsdp.models.spec import ModelSpec

if TYPE_CHECKING:
    from qsdp.models.language_model import LanguageModel


class GPT2(ModelSpec[GPTConfig]):
    """GPT-2 (Radford et al., 2019), and smaller ones of the same architecture."""

    sizes = GPTConfig
    presets = PRESETS
    training = TRAINING
    transformers = GPT2Form()

    def build(self, size: GPTConfig) -> LanguageModel:
        """A GPT of ``size``."""
        from qsdp.models.gpt2.model import GPT

        return GPT(size)

    def init_weights(self, model: LanguageModel, seed: int) -> None:
        """Fill a GPT as ``gpt2/init.py`` says."""
        from qsdp.models.gpt2.init import init_weights

        init_weights(model, seed)

    def flops_per_token(self, size: GPTConfig, seq_len: int) -> int:
        """Floating-point operations a token, as ``gpt2/model.py`` counts them."""
        from qsdp.models.gpt2.model import flops_per_token

        return flops_per_token(size, seq_len)


FAMILY = GPT2()
