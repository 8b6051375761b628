"""The plan: which bytes of a group's flat buffers are which parameter's, and how each travels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsdp.codec.payload import DType, Layout, Segment
from qsdp.comm.failures import title
from qsdp.config import ROUNDINGS, QSDPConfig

DTYPES = {torch.float32: DType.FP32, torch.bfloat16: DType.BF16, torch.float16: DType.FP16}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What the plan knows of one parameter of a group."""

    name: str
    index: int
    """Place among all parameters of the model: a counter word of the random generator."""
    shape: torch.Size
    """Of the whole parameter."""
    dtype: torch.dtype
    """In the all-gather buffer."""
    shard_dim: int
    weight_bits: int
    """2 to 8: coded. 16: bf16. 32: the value as it is."""
    grad_bits: int
    is_trainable: bool
    why: str
    """Why it travels so, for the report."""

    def shard_numel(self, rank: int, world_size: int) -> int:
        """Valid values of rank's slice: `torch.chunk` of the shard dimension."""
        rows = self.shape[self.shard_dim]
        chunk = -(-rows // world_size)
        mine = max(0, min(rows - rank * chunk, chunk))
        return mine * (self.shape.numel() // rows) if rows else 0

    def padded_numel(self, world_size: int) -> int:
        """Values that every rank's slice takes in a flat buffer: those of rank 0."""
        return self.shard_numel(0, world_size)


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the embeddings and the output head of ``model``: the weights of every nn.Embedding,
    and of every nn.Linear that has the shape of the largest of them, the vocabulary's."""
    modules = list(model.modules())
    weights = [m.weight for m in modules if isinstance(m, nn.Embedding)]
    if weights:
        vocabulary = max(weights, key=lambda weight: weight.shape[0]).shape
        linears = [m.weight for m in modules if isinstance(m, nn.Linear)]
        weights += [weight for weight in linears if weight.shape == vocabulary]
    found = {id(weight) for weight in weights}
    return {name for name, p in model.named_parameters() if id(p) in found}


class Side:
    """One layout of one direction with the codec tables of every rank.

    ``numels[r]`` are the valid values of rank r's slice of each segment.
    """

    def __init__(self, layout: Layout, numels: Sequence[Sequence[int]]) -> None:
        self.layout = layout
        self.tables = [torch.tensor(layout.table(n), dtype=torch.int64) for n in numels]
        self._numels = numels

    @cached_property
    def fp32_tables(self) -> list[Tensor]:
        """The same tables for a flat buffer in fp32."""
        return [torch.tensor(self.layout.table(n, DType.FP32)) for n in self._numels]

    def expected_headers(self, senders: Sequence[int], step: int) -> Tensor:
        """int64 [senders, 4]: what each payload must open with."""
        return torch.tensor([self.layout.header(sender, step) for sender in senders])


class Plan:
    """How one group travels.

    Args:
        parameters: in the order of FSDP2's flat buffer.
        index: the group's place in the model: a counter word of the random generator.
        group: the process group of the shard axis.
        config: roundings and bucket size.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        index: int,
        group: dist.ProcessGroup,
        config: QSDPConfig,
    ) -> None:
        self.parameters = tuple(parameters)
        self.index = index
        self.group = group
        self.world_size = group.size()
        self.rank = group.rank()
        self.global_ranks = dist.get_process_group_ranks(group)
        self.names = tuple(p.name for p in parameters)
        self.name = title(self.names)
        self._config = config
        self._reduces: dict[tuple[tuple[int, ...], torch.dtype], Side] = {}

    @cached_property
    def gather(self) -> Side:
        """The quantized all-gather."""
        segments = [self._segment(p, p.dtype, p.weight_bits, False) for p in self.parameters]
        return self._side(segments, self.parameters)

    @cached_property
    def exact_gather(self) -> Side:
        """The all-gather in full precision, for validation with exact weights."""
        segments = [self._segment(p, p.dtype, 32, False) for p in self.parameters]
        return self._side(segments, self.parameters)

    def reduce(self, with_grad: tuple[int, ...], dtype: torch.dtype) -> Side:
        """The quantized reduce-scatter of the parameters at places ``with_grad``, in ``dtype``."""
        if (with_grad, dtype) not in self._reduces:
            chosen = [self.parameters[i] for i in with_grad]
            segments = [self._segment(p, dtype, p.grad_bits, True) for p in chosen]
            self._reduces[with_grad, dtype] = self._side(segments, chosen)
        return self._reduces[with_grad, dtype]

    def _side(self, segments: list[Segment], parameters: Sequence[Parameter]) -> Side:
        numels = [
            [p.shard_numel(rank, self.world_size) * _units(p.dtype) for p in parameters]
            for rank in range(self.world_size)
        ]
        return Side(Layout(segments, self.index), numels)

    def _segment(
        self, parameter: Parameter, dtype: torch.dtype, bits: int, is_grad: bool
    ) -> Segment:
        own = DTYPES.get(dtype, DType.OPAQUE)
        narrow = bits == 16 and own == DType.FP32
        return Segment(
            bits=bits if bits <= 8 else 0,
            dtype=own,
            wire=DType.BF16 if narrow else own,
            padded=parameter.padded_numel(self.world_size) * _units(dtype),
            parameter=parameter.index,
            bucket=self._config.bucket_of(bits, is_grad=is_grad),
            rounding=ROUNDINGS.index(self._config.rounding_of(bits)),
        )


def _units(dtype: torch.dtype) -> int:
    """Elements of the codec per element: types that it does not know are counted in bytes."""
    return 1 if dtype in DTYPES else dtype.itemsize
