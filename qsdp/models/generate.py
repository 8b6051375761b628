"""Sampling from a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from qsdp.models.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens_BT: Tensor,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue each sequence by ``num_tokens`` sampled tokens.

    Under FSDP2 every rank calls this with the same arguments: each token is one forward, which is
    collective. The model sees the last ``context`` tokens and is put back into the mode it was in.

    Args:
        model: Plain or sharded.
        tokens_BT: int64 prompts, at least one token each.
        num_tokens: How many tokens to append to each.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among the ``top_k`` most likely tokens only; None samples among all.
        seed: The seed of the sampling, which draws on the CPU.

    Returns:
        int64 [B, T + num_tokens], prompts included, on the prompts' device.

    Raises:
        ValueError: A prompt is empty, the temperature or the count is negative, or top_k is below
            1.
        FloatingPointError: On every rank, where the model's logits are not finite.
    """
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] == 0:
        raise ValueError(
            f"the prompts have shape {tuple(tokens_BT.shape)}: give [batch, tokens] with at least "
            "one token each."
        )
    if temperature < 0 or num_tokens < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature {temperature}, num_tokens {num_tokens} and top_k {top_k} cannot be "
            "sampled with: choose 0 or more for the first two, and for top_k 1 or more, or None "
            "for all."
        )
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_tokens):
            logits_BTV, _ = model(tokens_BT[:, -model.config.context :])
            logits_BV = logits_BTV[:, -1].float().cpu()
            if not logits_BV.isfinite().all():
                raise FloatingPointError(
                    "the model's logits are not finite, so there is nothing to sample from: go "
                    "back to weights from before the training diverged."
                )
            next_B1 = _sample(logits_BV, temperature, top_k, generator)
            tokens_BT = torch.cat([tokens_BT, next_B1.to(tokens_BT.device)], dim=1)
    finally:
        model.train(was_training)
    return tokens_BT


def _sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=1, keepdim=True)
    if top_k is not None and top_k < logits_BV.shape[1]:
        kept_BV, tokens_BV = logits_BV.topk(top_k, dim=1)
        choice_B1 = _sample(kept_BV, temperature, None, generator)
        return tokens_BV.gather(1, choice_B1)
    # The maximum goes first: dividing by a tiny temperature must not overflow it.
    scaled_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)) / temperature
    return torch.multinomial(scaled_BV.softmax(dim=1), 1, generator=generator)
