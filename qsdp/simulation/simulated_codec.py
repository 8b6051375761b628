"""The codec of the simulated wire: segments of its parameters, and their values there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qsdp import ops
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import CODEC_DTYPES, DType
from qsdp.common.rounding import Rounding
from qsdp.config import QSDPConfig
from qsdp.ops.reference.rotation import RotatedStretch
from qsdp.simulation.numbering import Numbering


class _Tables(NamedTuple):
    """The operators' arguments for the values of one parameter."""

    layout: Layout
    encode: Tensor
    decode: Tensor


class SimulatedCodec:
    """The simulated codec: payloads of one parameter each.

    Args:
        config: Buckets and roundings.
        numbers: Counter words of the generator.
    """

    def __init__(self, config: QSDPConfig, numbers: Numbering) -> None:
        self._config, self._numbers = config, numbers
        self._tables: dict[tuple[Segment, int, bool], _Tables] = {}

    def forget(self) -> None:
        """Drop all tables that were made: what other masks leave has other sizes."""
        self._tables.clear()

    def segment(
        self, name: str, numel: int, dtype: torch.dtype, bits: int, *, is_grad: bool
    ) -> Segment:
        """``numel`` values of a parameter, in ``dtype``, as ``bits`` a value."""
        own = CODEC_DTYPES.get(dtype, DType.OPAQUE)
        return Segment(
            bits=bits if bits <= 8 else 0,
            dtype=own,
            wire=DType.BF16 if bits == 16 and own == DType.FP32 else own,
            padded=numel if own != DType.OPAQUE else numel * dtype.itemsize,
            parameter=self._numbers.parameters[name],
            bucket=self._config.bucket_of(bits, is_grad=is_grad),
            rounding=Rounding.of(self._config.rounding_of(bits, is_grad=is_grad)),
        )

    def kept_row(self, name: str, values: Tensor, bits: int) -> SegmentRow:
        """The coded ``values`` of a parameter's weights, of which ranks keep codes and grids."""
        segment = self.segment(name, values.numel(), values.dtype, bits, is_grad=False)
        layout = Layout([segment], self._numbers.groups[name])
        return SegmentRow(layout.table([values.numel()])[0])

    def cross(
        self,
        name: str,
        values: Tensor,
        key: int,
        bits: int,
        *,
        is_grad: bool,
        levels: Tensor | None,
    ) -> Tensor:
        """Encode and decode: weights in their own dtype, gradients into fp32.

        ``levels``: fp32 [2**bits], learned; None for the uniform grid.
        """
        dtype = torch.float32 if is_grad else values.dtype
        if bits == 32 or not values.numel():
            return values.to(dtype)
        segment = self.segment(name, values.numel(), values.dtype, bits, is_grad=is_grad)
        if levels is not None:
            segment = replace(segment, levels=0)
        tables = self._tables_of(name, segment, is_grad)
        layout = tables.layout
        payload = torch.empty(layout.payload_bytes, dtype=torch.uint8, device=values.device)
        sent = values.contiguous().view(-1).view(torch.uint8)
        ops.encode(sent, tables.encode, key, layout.header(0, 0), payload, levels)
        received = torch.empty(values.shape, dtype=dtype, device=values.device)
        buffer = received.view(-1).view(torch.uint8)
        ops.decode(payload, tables.decode, key, buffer, levels=levels)
        return received

    def rotated(self, values: Tensor, bucket: int) -> Tensor:
        """A copy of gradients ``values``, rotated in buckets: [Note: Rotation]."""
        found = values.clone(memory_format=torch.contiguous_format)
        dtype = CODEC_DTYPES[values.dtype]
        columns = {
            RotatedStretch.BYTE: 0,
            RotatedStretch.NUMEL: values.numel(),
            RotatedStretch.BUCKET: bucket,
            RotatedStretch.DTYPE: int(dtype),
        }
        stretches = torch.tensor([[columns[each] for each in RotatedStretch]])
        ops.rotate(found.view(-1).view(torch.uint8), stretches)
        return found

    def _tables_of(self, name: str, segment: Segment, is_grad: bool) -> _Tables:
        place = (segment, self._numbers.groups[name], is_grad)
        if place not in self._tables:
            layout = Layout([segment], self._numbers.groups[name])
            encode, decode = (
                torch.tensor(layout.table([segment.padded], dtype))
                for dtype in (None, DType.FP32 if is_grad else None)
            )
            self._tables[place] = _Tables(layout, encode, decode)
        return self._tables[place]
