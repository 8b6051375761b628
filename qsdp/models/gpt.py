"""The GPT-2 architecture in one file: configuration, model, initialisation, sampling, cost.

Shapes are in the names: B batch, T tokens, V vocabulary, D width, H heads, K width of a head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from qsdp.compat import named_parameters

INIT_STD = 0.02  # GPT-2's, for every matrix and both embeddings
_INIT_BLOCK_VALUES = (
    1 << 18
)  # values drawn from one generator key: bounds what a rank draws in vain


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The size of a GPT. Raises ValueError when no such model can exist."""

    vocab_size: int
    """Tokens in the vocabulary."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads of a block; must divide `width`."""
    width: int
    """Values that describe one token between blocks."""
    context: int
    """Longest sequence, in tokens."""
    bias: bool = True
    """Whether linears and norms have biases, as GPT-2's do."""
    dropout: float = 0.0
    """Probability of dropping a value in training: of the embeddings, attention and branches."""
    tie_weights: bool = True
    """Whether the output head is the token embedding itself."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "num_heads", "width", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} is {value!r}, but a GPT needs a whole number from 1: change it."
                )
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} cannot be split over {self.num_heads} heads: "
                "choose a width that is a multiple of num_heads."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: choose a number from 0 up to below 1.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The preset `name` with `overrides` (those that are None are left out).

        `tiny`, `nano` and `mini` have no vocabulary of their own: give them the data's
        `vocab_size`.
        Raises ValueError for an unknown preset or a missing vocabulary.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no model preset {name!r}: choose one of {list(PRESETS)}.")
        fields = PRESETS[name] | {k: v for k, v in overrides.items() if v is not None}
        if "vocab_size" not in fields:
            raise ValueError(f"Preset {name!r} takes its vocabulary from the data: set vocab_size.")
        return cls(**fields)


def _gpt2(num_layers: int, num_heads: int, width: int, context: int = 1024) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "width": width,
        "context": context,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_heads": 2, "width": 64, "context": 64, "bias": False},
    "nano": {"num_layers": 4, "num_heads": 4, "width": 128, "context": 64, "bias": False},
    "mini": {"num_layers": 6, "num_heads": 8, "width": 256, "context": 128, "bias": False},
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "gpt-1.3b": _gpt2(24, 16, 2048, context=2048),
}


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
    """One pre-norm transformer block: the unit that `fully_shard` wraps."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm_attn = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + _drop(self.attn(self.norm_attn(x_BTD)), self.dropout, self.training)
        return x_BTD + _drop(self.mlp(self.norm_mlp(x_BTD)), self.dropout, self.training)


class GPT(nn.Module):
    """GPT-2: embeddings, `blocks`, a last norm and a head (Radford et al., 2019).

    With `tie_weights` the head has no parameter of its own: the root's forward multiplies by
    `embed.weight`, so the tie survives `to_empty`, which gives every module a tensor of its own.
    The parameters keep torch's default values until `init_weights` fills them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
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
        """Predict the token after each of `tokens_BT` (int64).

        Without targets: (logits_BTV, None). With targets (int64): (None, loss), the mean
        cross-entropy in nats a token, an fp32 scalar; the logits are not kept alive.
        Raises ValueError for a sequence longer than the context.
        """
        num_tokens = tokens_BT.shape[1]
        if num_tokens > self.config.context:
            raise ValueError(
                f"A sequence of {num_tokens} tokens exceeds the model's context of "
                f"{self.config.context}: shorten it, or build a model with a longer context."
            )
        x_BTD = self.embed(tokens_BT) + self.position.weight[:num_tokens]
        x_BTD = _drop(x_BTD, self.config.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm_out(x_BTD)
        logits_BTV = F.linear(x_BTD, self.embed.weight) if self.head is None else self.head(x_BTD)
        if targets_BT is None:
            return logits_BTV, None
        return None, F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def _drop(x: Tensor, probability: float, training: bool) -> Tensor:
    return F.dropout(x, probability) if training and probability else x


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill the parameters of a GPT in place, each as a pure function of (seed, its name).

    Matrices are normal with standard deviation 0.02, the projections that write into the residual
    stream divided by sqrt(2 num_layers); norms are 1, biases 0. A parameter may be plain or an
    FSDP2 DTensor, whose local shard gets its slice of the full tensor: the model is the same for
    every world size. No communication. Values are drawn on the CPU.

    Raises ValueError for a negative seed, for a parameter still on the meta device, and for a
    sharding that FSDP2 does not make.
    """
    if seed < 0:
        raise ValueError(f"The seed is {seed}: choose 0 or more.")
    num_layers = sum(isinstance(module, Block) for module in model.modules())
    for name, parameter in named_parameters(model).items():
        if parameter.is_meta:
            raise ValueError(
                f"Parameter {name} is on the meta device: call model.to_empty(device=...) "
                "before init_weights."
            )
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = INIT_STD
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * num_layers)
        rows, *others = local_slices(parameter)
        for first, values in _normal_rows(parameter.shape, f"{seed}/{name}", rows):
            target = local[first - rows.start : first - rows.start + len(values)]
            target.copy_(torch.from_numpy(values)[(slice(None), *others)] * std)


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Where a parameter's local part lies in the full tensor: one slice a dim, maybe empty.

    Raises ValueError for a placement other than Replicate and Shard.
    """
    starts, stops = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if type(placement) is Shard:
                dim = placement.dim
                size = -(-(stops[dim] - starts[dim]) // mesh.size(axis))
                start = starts[dim] + mesh.get_local_rank(axis) * size
                starts[dim] = min(start, stops[dim])
                stops[dim] = min(start + size, stops[dim])
            elif type(placement) is not Replicate:
                raise ValueError(
                    f"A parameter is placed as {placement}, but only Shard and Replicate are "
                    "known here: shard the model with fully_shard alone."
                )
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


def _normal_rows(
    shape: torch.Size, key: str, rows: slice
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Standard normal `rows` of a tensor of `shape`, as (first row, values) pieces.

    The tensor is made of blocks of whole rows, each from a generator of its own: a shard draws
    the blocks it touches and no others.
    """
    if rows.start == rows.stop:
        return
    row_shape = tuple(shape[1:])
    block_rows = max(1, _INIT_BLOCK_VALUES // max(1, math.prod(row_shape)))
    for block_start in range(rows.start - rows.start % block_rows, rows.stop, block_rows):
        num_rows = min(block_rows, shape[0] - block_start)
        digest = hashlib.sha256(f"{key}/{block_start}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16])))
        values = generator.standard_normal((num_rows, *row_shape), dtype=np.float32)
        first = max(block_start, rows.start)
        yield first, values[first - block_start : rows.stop - block_start]


@torch.no_grad()
def generate(
    model: GPT,
    tokens_BT: Tensor,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue each sequence by `num_tokens` sampled tokens.

    Under FSDP2 every rank calls this with the same arguments: each token is one forward, which is
    collective. The model sees the last `context` tokens and is put back into the mode it was in.

    Args:
        model: a GPT, plain or sharded.
        tokens_BT: int64 prompts, at least one token each.
        num_tokens: how many tokens to append to each.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the `top_k` most likely tokens only; None samples among all.
        seed: of the sampling, which draws on the CPU.

    Returns: int64 [B, T + num_tokens], prompts included, on the prompts' device.
    Raises: ValueError for an empty prompt, a negative temperature or count, or top_k below 1;
        FloatingPointError, on every rank, where the model's logits are not finite.
    """
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] == 0:
        raise ValueError(
            f"The prompts have shape {tuple(tokens_BT.shape)}: give [batch, tokens] with at least "
            "one token each."
        )
    if temperature < 0 or num_tokens < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature {temperature}, num_tokens {num_tokens} and top_k {top_k} cannot be "
            "sampled with: the first two must be 0 or more, top_k 1 or more, or None for all."
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
                    "The model's logits are not finite, so there is nothing to sample from: go "
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


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Floating-point operations of one forward and backward, a token of a `seq_len` sequence.

    6 for each weight that multiplies (the head's too, tied or not; embeddings only look up), and
    12 num_layers width seq_len for attention, the mask's zeros counted: the convention in which
    model FLOPs utilisation is quoted (PaLM, arXiv 2204.02311, appendix B).
    `seq_len` is the context unless given.
    """
    multiplying = config.num_layers * 12 * config.width**2 + config.vocab_size * config.width
    attention = 12 * config.num_layers * config.width * (seq_len or config.context)
    return 6 * multiplying + attention
