"""The two codec operators and their plain-PyTorch kernels: the numerical specification.

`torch.ops.qsdp.encode` turns a flat buffer into a payload, `torch.ops.qsdp.decode` turns it back;
one call works through all segments of a group (see [Note: Payload] for the bytes and `Field` for
the table). Other kernels (csrc/) give the same bytes for the same key.

[Note: Grid] A bucket of b-bit codes, L = 2**b - 1, in fp32 arithmetic without contraction:

    lo, hi   least and greatest value. A bucket with exact zeros leaves them out, spans the rest
             with L - 1 steps and keeps code L for +0.0; its stored scale has the sign bit set.
    d        hi / steps - lo / steps, which cannot overflow; a subnormal d counts as 0
    code     round_half_even((x - lo) * (1 / d) - r), `stochastic`
             floor((x - lo) * (1 / d) + (r + 1/2)); clamped to 0..steps
    value    lo + (code + r) * d; stochastic and nearest: r = 0. Clamped to the finite range of the
             dtype it is stored in.

r is in (-1/2, 1/2): one a bucket (`shift`: QSDP, arXiv 2302.02390, section 4), one a value
(`dither`). A bucket with |lo| > 2**120 or d > 2**112 is worked on scaled by 2**-8, so that no
difference overflows. A bucket with a NaN or an Inf has lo = NaN, scale 0 and codes 0: it decodes
to NaN.
"""

import torch
from torch import Tensor

from qsdp.codec.payload import HEADER_BYTES, ITEM_BYTES, META_BYTES, DType, Field
from qsdp.codec.rounding import DITHER, NEAREST, SHIFT, STOCHASTIC, uniform

HUGE_VALUE = 2.0**120
HUGE_SCALE = 2.0**112
HUGE_FACTOR = 2.0**-8

TORCH_DTYPES = {
    DType.FP32: torch.float32,
    DType.BF16: torch.bfloat16,
    DType.FP16: torch.float16,
    DType.OPAQUE: torch.uint8,
}

_library = torch.library.Library("qsdp", "DEF")
_library.define(
    "encode(Tensor buffer, Tensor table, int key, int[] header, Tensor(a!) payload) -> ()"
)
_library.define(
    "decode(Tensor payload, Tensor table, int key, Tensor(a!) buffer, bool add=False) -> ()"
)


def encode(buffer: Tensor, table: Tensor, key: int, header: list[int], payload: Tensor) -> None:
    """Write the payload of one group.

    Args:
        buffer: uint8 [bytes], contiguous: the flat buffer viewed as bytes.
        table: int64 [segments, len(Field)] on the CPU: one row a segment.
        key: the folded `Key`.
        header: four int64 words, see `Layout.header`.
        payload: uint8 [payload bytes], contiguous, overwritten.
    """
    check(buffer, table, payload)
    if len(header) != HEADER_BYTES // 8:
        raise ValueError(f"the header has {len(header)} words; give 4, as Layout.header does")
    payload.zero_()
    payload[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(header))
    for row in table.tolist():
        segment = _Row(row)
        values = segment.values(buffer)
        if segment.bits == 0:
            segment.data(payload).copy_(convert(values, segment.wire).view(torch.uint8))
            continue
        codes, low, scale = quantize(values.float(), segment, key)
        segment.meta(payload).copy_(torch.stack((low, scale), dim=1).view(-1).view(torch.uint8))
        segment.data(payload).copy_(pack(codes, segment.bits))


def decode(payload: Tensor, table: Tensor, key: int, buffer: Tensor, add: bool = False) -> None:
    """Write (or with ``add`` add, into fp32) the values of one payload into the flat buffer.

    Args as in `encode`. Without ``add``, padding is set to zero; with it, padding stays.
    """
    check(buffer, table, payload, add)
    for row in table.tolist():
        segment = _Row(row)
        if segment.bits == 0:
            values = convert(segment.data(payload).clone().view(segment.wire), segment.dtype)
        else:
            meta = segment.meta(payload).clone().view(torch.float32).view(-1, 2)
            codes = unpack(segment.data(payload), segment.bits, segment.numel)
            limit = torch.finfo(segment.dtype).max
            values = dequantize(codes, meta[:, 0], meta[:, 1], segment, key)
            values = convert(values.clamp(-limit, limit), segment.dtype)
        if add:
            values = segment.values(buffer) + values
        segment.store(buffer, values, keep_padding=add)


def quantize(x: Tensor, segment: "_Row", key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8 [n]), lows and scales (fp32 [buckets]) of fp32 [n], see [Note: Grid]."""
    buckets = -(-x.numel() // segment.bucket)
    x_NB = torch.nn.functional.pad(x, (0, buckets * segment.bucket - x.numel()), value=1.0)
    x_NB = x_NB.view(buckets, segment.bucket)
    valid = torch.arange(x_NB.numel(), device=x.device).view_as(x_NB) < x.numel()
    zero = valid & (x_NB == 0)
    live = valid & ~zero
    steps = torch.where(zero.any(1), segment.levels - 2, segment.levels - 1).float()
    empty = ~live.any(1)
    low = x_NB.masked_fill(~live, torch.inf).amin(1).masked_fill(empty, 0.0)
    high = x_NB.masked_fill(~live, -torch.inf).amax(1).masked_fill(empty, 0.0)
    broken = (valid & ~x_NB.isfinite()).any(1)
    d = high / steps - low / steps
    d = d.masked_fill(broken | (d < torch.finfo(torch.float32).tiny), 0.0)
    low = low.masked_fill(broken, torch.nan)

    factor = _huge_factor(low, d)
    inverse = (1 / (d * factor)).masked_fill(d == 0, 0.0)
    t = (x_NB * factor[:, None] - (low * factor)[:, None]) * inverse[:, None]
    r = segment.shifts(key, x_NB)
    if segment.rounding == STOCHASTIC:
        codes = torch.floor(t + (r + 0.5))
    else:
        codes = torch.round(t - r)
    codes = torch.minimum(codes.clamp(min=0), steps[:, None])
    codes = codes.masked_fill(zero, segment.levels - 1).masked_fill(broken[:, None], 0)
    scale = torch.where(zero.any(1) & ~broken, -d, d)
    return codes.view(-1)[: x.numel()].to(torch.uint8), low, scale


def dequantize(codes: Tensor, low: Tensor, scale: Tensor, segment: "_Row", key: int) -> Tensor:
    """fp32 [n] values of uint8 [n] codes, see [Note: Grid]."""
    buckets = low.numel()
    c_NB = torch.nn.functional.pad(codes, (0, buckets * segment.bucket - codes.numel()))
    c_NB = c_NB.view(buckets, segment.bucket)
    r = segment.shifts(key, c_NB)
    if segment.rounding == STOCHASTIC:
        r = torch.zeros_like(r)
    d = scale.abs()
    factor = _huge_factor(low, d)
    value = (low * factor)[:, None] + (c_NB.float() + r) * (d * factor)[:, None]
    value = value / factor[:, None]
    is_zero = scale.signbit()[:, None] & (c_NB == segment.levels - 1)
    return value.masked_fill(is_zero, 0.0).view(-1)[: codes.numel()]


def convert(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, rounded to nearest even; a narrowed NaN is the canonical one."""
    if values.dtype == dtype or dtype == torch.float32:
        return values.to(dtype)
    return values.to(dtype).masked_fill(values.isnan(), torch.nan)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n] codes as a little-endian bit stream, uint8 [ceil(n * bits / 8)]."""
    num_bytes = -(-codes.numel() * bits // 8)
    groups = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).long()
    words = (groups << bits * torch.arange(8, device=codes.device)).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[:num_bytes]


def unpack(stream: Tensor, bits: int, num: int) -> Tensor:
    """The ``num`` codes (uint8) of a bit stream that `pack` made."""
    groups = -(-num // 8)
    stream = torch.nn.functional.pad(stream, (0, groups * bits - stream.numel()))
    octets = torch.nn.functional.pad(stream.view(groups, bits), (0, 8 - bits)).contiguous()
    words = octets.view(torch.int64)
    codes = words >> bits * torch.arange(8, device=stream.device) & (1 << bits) - 1
    return codes.view(-1)[:num].to(torch.uint8)


def check(buffer: Tensor, table: Tensor, payload: Tensor, add: bool = False) -> None:
    """Raise ValueError when a codec call's arguments cannot be what it needs."""
    for name, tensor in (("buffer", buffer), ("payload", payload)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"the {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                "give a contiguous 1-D uint8 view"
            )
    if table.dtype != torch.int64 or table.device.type != "cpu" or table.dim() != 2:
        raise ValueError(
            f"the table is {table.dtype} on {table.device}; give int64 rows on the cpu"
        )
    if table.shape[1] != len(Field):
        raise ValueError(f"the table has {table.shape[1]} columns; give {len(Field)}")
    if payload.numel() < HEADER_BYTES:
        raise ValueError(f"the payload has {payload.numel()} bytes; a header alone takes 32")
    for row in table.tolist():
        for field in (Field.DTYPE, Field.WIRE):
            if row[field] not in iter(DType):
                raise ValueError(f"a segment has {field.name} {row[field]}; give 0 to {max(DType)}")
        _Row(row).check(buffer.numel(), payload.numel())
        if add and row[Field.DTYPE] != DType.FP32:
            name = DType(row[Field.DTYPE]).name
            raise ValueError(f"decode adds into a segment of {name}; give an fp32 buffer and table")


class _Row:
    """One table row with names, and the slices it stands for."""

    def __init__(self, row: list[int]) -> None:
        self.bits, self.bucket, self.rounding = (
            row[Field.BITS],
            row[Field.BUCKET],
            row[Field.ROUNDING],
        )
        self.numel, self.padded = row[Field.NUMEL], row[Field.PADDED]
        self.levels = 1 << max(self.bits, 0)
        self.row = row
        self.dtype = TORCH_DTYPES[DType(row[Field.DTYPE])]
        self.wire = TORCH_DTYPES[DType(row[Field.WIRE])]

    def check(self, buffer_bytes: int, payload_bytes: int) -> None:
        row = self.row
        if self.bits not in (0, 2, 3, 4, 5, 6, 7, 8):
            raise ValueError(f"a segment has {self.bits} bits; give 2 to 8, or 0 for raw")
        if not 0 <= self.numel <= self.padded:
            raise ValueError(f"a segment has {self.numel} of {self.padded} values; give 0 to all")
        item = ITEM_BYTES[DType(row[Field.DTYPE])]
        inside = row[Field.BUFFER_BYTE] >= 0 and row[Field.DATA_BYTE] >= HEADER_BYTES
        inside &= row[Field.BUFFER_BYTE] + self.padded * item <= buffer_bytes
        if self.bits:
            if self.bucket < 8 or self.bucket % 8 or self.rounding not in (0, 1, 2, 3):
                raise ValueError(
                    f"a segment has buckets of {self.bucket} and rounding {self.rounding}; "
                    "give a positive multiple of 8 and 0 to 3"
                )
            if row[Field.DTYPE] == DType.OPAQUE:
                raise ValueError("a coded segment is opaque; code fp32, bf16 or fp16")
            num_buckets = -(-self.numel // self.bucket)
            inside &= row[Field.META_BYTE] >= HEADER_BYTES and row[Field.META_BYTE] % 4 == 0
            inside &= row[Field.META_BYTE] + META_BYTES * num_buckets <= payload_bytes
        elif (row[Field.DTYPE] == DType.OPAQUE) != (row[Field.WIRE] == DType.OPAQUE):
            raise ValueError("a raw segment is opaque on one side only; make both or none opaque")
        inside &= row[Field.DATA_BYTE] + self.data_bytes <= payload_bytes
        if not inside:
            raise ValueError(
                f"a segment reaches outside its {buffer_bytes} buffer bytes or "
                f"{payload_bytes} payload bytes; make table, buffer and payload from one layout"
            )

    @property
    def data_bytes(self) -> int:
        if self.bits:
            return -(-self.numel * self.bits // 8)
        return self.numel * ITEM_BYTES[DType(self.row[Field.WIRE])]

    def values(self, buffer: Tensor) -> Tensor:
        """The segment's valid values: its dtype, [numel], a copy (offsets may be unaligned)."""
        return self._span(buffer, self.numel).clone().view(self.dtype)

    def store(self, buffer: Tensor, values: Tensor, keep_padding: bool) -> None:
        self._span(buffer, self.numel).copy_(values.view(torch.uint8))
        if not keep_padding:
            self._span(buffer, self.padded)[values.numel() * self.dtype.itemsize :].zero_()

    def meta(self, payload: Tensor) -> Tensor:
        return payload.narrow(
            0, self.row[Field.META_BYTE], META_BYTES * -(-self.numel // self.bucket)
        )

    def data(self, payload: Tensor) -> Tensor:
        return payload.narrow(0, self.row[Field.DATA_BYTE], self.data_bytes)

    def shifts(self, key: int, like_NB: Tensor) -> Tensor:
        """r of [Note: Grid], fp32, broadcastable to [buckets, bucket]."""
        words = (self.row[Field.PARAMETER], self.row[Field.GROUP], key, like_NB.device)
        if self.rounding == SHIFT:
            return uniform(like_NB.shape[0], *words)[:, None]
        if self.rounding in (DITHER, STOCHASTIC):
            return uniform(like_NB.numel(), *words).view_as(like_NB)
        assert self.rounding == NEAREST
        return torch.zeros(1, 1, device=like_NB.device)

    def _span(self, buffer: Tensor, numel: int) -> Tensor:
        return buffer.narrow(0, self.row[Field.BUFFER_BYTE], numel * self.dtype.itemsize)


def _huge_factor(low: Tensor, d: Tensor) -> Tensor:
    huge = (low.abs() > HUGE_VALUE) | (d > HUGE_SCALE)
    return torch.where(huge, HUGE_FACTOR, 1.0).to(torch.float32)


def _no_result(*_: object) -> None:
    return None


for _name, _kernel in (("encode", encode), ("decode", decode)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qsdp::{_name}", _no_result, lib=_library)
