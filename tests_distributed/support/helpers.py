"""A small model with the shapes that are hard to shard, and what tests do with it.

At 2 to 4 ranks its parameters give even, uneven and empty shards: width 10 over 4 ranks is
3, 3, 3, 1; the 5 hidden units are 2, 2, 1, 0; the single gain is 1, 0, 0, 0.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from qsdp.config import QSDPConfig

# Legend: B sequences, T tokens, C width, V vocabulary.

ModelT = TypeVar("ModelT", bound=nn.Module)
KeyT = TypeVar("KeyT")
T = TypeVar("T")


def wire_config(size: int, /, **settings: Any) -> QSDPConfig:
    """A config with buckets of ``size``, unless ``settings`` have others or nothing is coded."""
    is_coded = QSDPConfig(**settings).has_codes
    return QSDPConfig(**{"bucket_size": size if is_coded else None, **settings})


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Sizes and peculiarities of a ``Toy``."""

    vocab_size: int = 13
    num_layers: int = 2
    width: int = 10
    num_heads: int = 2
    hidden: int = 5
    context: int = 8
    tied: bool = False
    """The head uses the token embedding's weight."""
    frozen: bool = False
    """The first block's attention output, and one of its norms, need no gradient."""
    unused: bool = False
    """Every block has a linear layer that the forward pass does not use."""
    trained: str = "*"
    """The pattern of the names of all that needs a gradient, if anything is frozen beside that."""
    zeros: bool = False
    """The blocks' attention outputs begin as zeros, as adapters do."""
    bf16: bool = False
    """All parameters are bf16."""
    again: bool = False
    """The first block is passed through once more, after the last."""
    checkpointing: bool = False
    """Blocks are recomputed in the backward pass."""
    reentrant: bool = False
    """They are in the way that torch knew first."""
    conv1d: bool = False
    """The blocks' linear layers store their weights as [in, out]."""


class Conv1D(nn.Module):
    """A linear layer as in transformers, by which methods of compression know it: [in, out]."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_in, features_out) / features_in**0.5)
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC @ self.weight + self.bias


class Mlp(nn.Module):
    """Linear, GELU, linear, times one learned gain."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        linear = Conv1D if config.conv1d else nn.Linear
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC: Tensor = self.gain * self.down(F.gelu(self.up(x_BTC)))
        return y_BTC


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.width)
        linear = Conv1D if config.conv1d else nn.Linear
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config)
        if config.unused:
            self.unused = nn.Linear(config.width, 3)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x_BTC)).chunk(3, dim=-1)
        ]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(mixed.transpose(1, 2).flatten(2))
        x_BTC = x_BTC + self.mlp(self.norm2(x_BTC))
        return x_BTC


class Toy(nn.Module):
    """A GPT of a few thousand parameters.

    ``resting`` are the numbers of blocks that the forward pass leaves out.
    """

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, self.resting = config, frozenset[int]()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        if config.frozen:
            first = self.blocks[0]
            assert isinstance(first, Block)
            for parameter in [*first.out.parameters(), first.norm1.weight]:
                parameter.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if not fnmatchcase(name, config.trained):
                parameter.requires_grad_(False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``targets_BT`` (int64) in nats, a scalar."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTC = self.embed(tokens_BT) + self.position(positions_T)
        blocks = [block for i, block in enumerate(self.blocks) if i not in self.resting]
        for block in blocks + blocks[: self.config.again]:
            if self.config.checkpointing:
                x_BTC = checkpoint(block, x_BTC, use_reentrant=self.config.reentrant)
            else:
                x_BTC = block(x_BTC)
        logits_BTV = self.head(self.norm(x_BTC))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def make_model(seed: int = 0, **options: Any) -> Toy:
    """A ``Toy`` of ``ToyConfig(**options)`` whose weights, biases and norms are all random.

    The weights are a function of ``seed`` alone; the caller's random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Toy(ToyConfig(**options))
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("gain"):
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            if model.config.zeros and name.endswith("out.weight"):
                parameter.data.zero_()
    return model.bfloat16() if model.config.bf16 else model


def make_batch(model: Toy, seed: int, rank: int | None = None, batch_size: int = 3) -> list[Tensor]:
    """Tokens and targets, both int64 [batch_size, context], on the model's device.

    They are a function of (seed, rank). ``rank`` is the calling process's own if it is not given.
    """
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    shape = (2, batch_size, model.config.context)
    batch = torch.randint(model.config.vocab_size, shape, generator=generator)
    return list(batch.to(next(model.parameters()).device))


def all_ranks(device_type: str = "cpu") -> DeviceMesh:
    """One axis over all ranks, of the default process group itself."""
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, device_type)


def shard(
    model: ModelT,
    *,
    reshard: bool | None = True,
    nested: bool = True,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> ModelT:
    """Apply ``fully_shard`` to the MLPs (if ``nested``), the blocks and the root, in place.

    Args:
        model: A ``Toy``, or any model with ``blocks``, each with an ``mlp``.
        reshard: ``reshard_after_forward`` of every group.
        nested: Give each MLP a group of its own inside its block's.
        mesh: Defaults to one over all ranks, of the model's device (meta: the CPU).
        options: More options of ``fully_shard``, for instance ``mp_policy``.
    """
    if mesh is None:
        first = next(model.parameters())
        mesh = all_ranks("cpu" if first.is_meta else first.device.type)
    blocks = list(model.get_submodule("blocks").children())
    groups: list[nn.Module] = []
    for block in blocks:
        groups += [block.get_submodule("mlp"), block] if nested else [block]
    groups.append(model)
    for module in groups:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, **options)
    return model


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, tied ones once, gathered exactly from its shards (a collective)."""
    return full_of_all(dict(model.named_parameters()))


def full_grads(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient that exists, gathered exactly from its shards (a collective)."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return full_of_all({name: grad for name, grad in grads.items() if grad is not None})


def full_of_all(tensors: Mapping[KeyT, Tensor]) -> dict[KeyT, Tensor]:
    """A copy on the CPU of each, gathered exactly if it is sharded. A collective.

    It is one exchange for all of a mesh: one for each tensor would take most of a test's time.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    by_mesh: dict[DeviceMesh, dict[KeyT, DTensor]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            by_mesh.setdefault(tensor.device_mesh, {})[name] = tensor
    for mesh, sharded in by_mesh.items():
        mine = {name: _packed(tensor.to_local()) for name, tensor in sharded.items()}
        everyones: list[Any] = [None] * mesh.size(-1)  # of HSDP's axes the last is that of shards
        dist.all_gather_object(everyones, mine, group=mesh.get_group(mesh.ndim - 1))
        for name, tensor in sharded.items():
            placement = tensor.placements[-1]
            assert isinstance(placement, Shard)
            parts = [_unpacked(*each[name]) for each in everyones]
            whole[name] = torch.cat(parts, dim=placement.dim)
    return {name: whole[name].detach().cpu().clone() for name in tensors}


def _packed(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Pickles in a tenth of a tensor's time."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def _unpacked(dtype: torch.dtype, shape: torch.Size, values: bytes) -> Tensor:
    if not values:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=dtype).view(shape)


def found_by_one(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, for every rank. A collective.

    It is for what all would compute alike, on few cores.
    """
    found: list[Any] = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    result: T = found[0]
    return result


def local_part(whole: Tensor, axis_size: int, index: int, dim: int = 0) -> Tensor:
    """The part that rank ``index`` of the shard axis has, as torch.chunk cuts."""
    part = math.ceil(whole.shape[dim] / axis_size)
    begin = min(index * part, whole.shape[dim])
    return whole.narrow(dim, begin, min(part, whole.shape[dim] - begin))


def collected(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``, and let go of its DDP while there is a process group.

    An optimizer and its base hold the DDP in a cycle: a collector that ends the group waits for
    threads that wait for it.
    """
    result = function(*args)
    gc.collect()
    return result
