"""The GPT-2 architecture, and what a token costs.

Shapes are in the names: B batch, T tokens, V vocabulary, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.language_model import LanguageModel


class Attention(nn.Module):
    """Causal self-attention with one linear for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BT3HK = self.qkv(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads)
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two linears around a GELU (the tanh form, as GPT-2 has it), four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block: the unit that ``fully_shard`` wraps."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm_attn = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + _dropout(self.attn(self.norm_attn(x_BTD)), self.dropout, self.training)
        return x_BTD + _dropout(self.mlp(self.norm_mlp(x_BTD)), self.dropout, self.training)


class GPT(LanguageModel):
    """GPT-2: embeddings, ``blocks``, a last norm and a head (Radford et al., 2019).

    With ``tie_weights`` the head has no parameter of its own: the root's forward multiplies by
    ``embed.weight``, so the tie survives ``to_empty``, which gives every module a tensor of its
    own. The parameters keep torch's default values until ``init_weights`` fills them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config: GPTConfig = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.width, bias=config.bias)
        self.head = (
            None if config.tie_weights else nn.Linear(config.width, config.vocab_size, bias=False)
        )

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict the token after each of ``tokens_BT`` (int64).

        Without targets: (logits_BTV, None). With targets (int64): (None, loss), the mean
        cross-entropy in nats a token, an fp32 scalar; the logits are not kept alive. Raises
        ValueError for a sequence longer than the context.
        """
        num_tokens = tokens_BT.shape[1]
        if num_tokens > self.config.context:
            raise ValueError(
                f"a sequence of {num_tokens} tokens exceeds the model's context of "
                f"{self.config.context}: shorten it, or build a model with a longer context."
            )
        x_BTD = self.embed(tokens_BT) + self.position.weight[:num_tokens]
        x_BTD = _dropout(x_BTD, self.config.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm_out(x_BTD)
        logits_BTV = F.linear(x_BTD, self.embed.weight) if self.head is None else self.head(x_BTD)
        if targets_BT is None:
            return logits_BTV, None
        return None, F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def _dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    return F.dropout(x, probability) if training and probability else x


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Floating-point operations of GPT-2, forward and backward, a token of a ``seq_len`` sequence.

    6 for each weight that multiplies (the head's too, tied or not; embeddings only look up), and 12
    num_layers width seq_len for attention, the mask's zeros counted: the convention in which model
    FLOPs utilisation is quoted (PaLM, arXiv 2204.02311, appendix B). ``seq_len`` is the context
    unless given.
    """
    multiplying = config.num_layers * 12 * config.width**2 + config.vocab_size * config.width
    attention = 12 * config.num_layers * config.width * (seq_len or config.context)
    return 6 * multiplying + attention
