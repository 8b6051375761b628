"""The reference codec in plain PyTorch: the numerical specification of ``encode`` and ``decode``.

``encode`` turns a flat buffer into a payload, ``decode`` turns it back; one call works through all
segments of a group (see [Note: Payload] for the bytes and ``Field`` for the table). ``encode_all``
and ``decode_all`` are loops over them (see ``Part``). Other kernels (csrc/) give the same bytes for
the same key.

[Note: Grid] A bucket of b-bit codes, L = 2**b - 1, in fp32 arithmetic without contraction:

    lo, hi   least and greatest value. A bucket with exact zeros leaves them out, spans the rest
             with L - 1 steps and keeps code L for +0.0; its stored scale has the sign bit set.
    d        hi / steps - lo / steps, which cannot overflow; a subnormal d counts as 0
    t        (x - lo) * (1 / d)
    code     round_half_even(t - r), or where the rounding goes down floor(t + (r + 1/2)); clamped
             to 0..steps
    value    lo + (code + r) * d, or lo + code * d where r is not taken back. Clamped to the finite
             range of the dtype it is stored in.

r is in (-1/2, 1/2): one a bucket (``shift``: QSDP, arXiv 2302.02390, section 4), one a value
(``dither``, ``stochastic``), or 0 (``nearest``). Which rounding does which its ``Properties`` say;
the arithmetic of r and of the code stands in ``grid_numbers`` and ``unclamped_codes``. A bucket
with |lo| > 2**120 or d > 2**112 is worked on scaled by 2**-8, so that no difference overflows. A
bucket with a NaN or an Inf has lo = NaN, scale 0 and codes 0: it decodes to NaN.

A segment with learned levels l[0] = 0 <= l[1] <= ... <= l[L] = 1 (QSDP, section 5) does all this
alike. Its metadata is the same, so that both sides see alike which buckets the levels serve: those
whose scale is above zero (no exact zeros, not all-equal, whole) and that are not huge. There:

    w        d * L
    t        (x - lo) * (1 / w)
    i        the last index with l[i] <= t, by bisection
    code     i + (l[i + 1] - t < t - l[i]), where a number is drawn for each value
             i + ((r + 1/2) * (l[i + 1] - l[i]) < t - l[i]); at most L, and l[L + 1] counts as l[L]
    value    lo + l[code] * w

A comparison counts as 0 or 1, and no level divides: equal neighbours are harmless. The greater of
two neighbours is taken with the probability that unbiasedness asks for, to 2**-17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsdp.codec.payload import HEADER_BYTES
from qsdp.codec.segment_table import Field, SegmentRow, check_table, check_tables
from qsdp.common.rounding import Drawn, Rounding
from qsdp.ops.reference.grid import (
    Extent,
    draw_grid,
    grid_steps,
    has_learned_levels,
    huge_factor,
    measure,
    place_on_grid,
)
from qsdp.ops.reference.packing import convert_values, pack_codes, unpack_codes


def encode(
    buffer: Tensor,
    table: Tensor,
    key: int,
    header: list[int],
    payload: Tensor,
    levels: Tensor | None = None,
) -> None:
    """The reference codec's ``encode``, its specification: write the payload of one group.

    Args:
        buffer: uint8 [bytes], contiguous: the flat buffer viewed as bytes.
        table: int64 [segments, len(Field)] on the CPU: one row a segment.
        key: The folded ``RandomKey``.
        header: Four int64 words, see ``Layout.header``.
        payload: uint8 [payload bytes], contiguous, overwritten.
        levels: fp32 [floats] on the CPU, contiguous: what ``Field.LEVELS`` points into.
    """
    check_table(buffer, table, payload, levels)
    _check_draws(table)
    _check_header(header)
    _encode(buffer, table, key, header, payload, levels)


def decode(
    payload: Tensor,
    table: Tensor,
    key: int,
    buffer: Tensor,
    add: bool = False,
    levels: Tensor | None = None,
) -> None:
    """The reference codec's ``decode``, its specification: write or add a payload's values.

    They are written into the flat buffer, or with ``add`` added, into fp32. Args as in ``encode``.
    Without ``add``, padding is set to zero; with it, padding stays.
    """
    check_table(buffer, table, payload, levels, add)
    _decode(payload, table, key, buffer, add, levels)


def encode_all(
    buffers: Tensor,
    tables: Tensor,
    parts: Tensor,
    header: list[int],
    payloads: Tensor,
    levels: Tensor | None = None,
) -> None:
    """The reference codec's ``encode_all``, its specification: many payloads of one group.

    They are written as ``encode`` writes each, part after part.

    Args:
        buffers: uint8 [rows, bytes], contiguous: a row is a flat buffer viewed as bytes.
        tables: int64 [kinds, segments, len(Field)] on the CPU: what parts name by its number.
        parts: int64 [parts, len(Part)] on the CPU.
        header: Four int64 words, which all the payloads open with.
        payloads: uint8 [payloads, payload bytes], contiguous; what parts name is overwritten.
        levels: fp32 [floats] on the CPU, contiguous: what ``Field.LEVELS`` points into.
    """
    check_tables(buffers, tables, parts, payloads, levels, may_add=False)
    _check_draws(tables)
    _check_header(header)
    for key, table, row, payload, _ in parts.tolist():
        _encode(buffers[row], tables[table], key, header, payloads[payload], levels)


def decode_all(
    payloads: Tensor,
    tables: Tensor,
    parts: Tensor,
    buffers: Tensor,
    levels: Tensor | None = None,
) -> None:
    """The reference codec's ``decode_all``, its specification: many payloads of one group.

    They are decoded as ``decode`` decodes each, part after part. Several parts may write one row,
    and a row that no part names stays. Args as in ``encode_all``.
    """
    check_tables(buffers, tables, parts, payloads, levels, may_add=True)
    for key, table, row, payload, add in parts.tolist():
        _decode(payloads[payload], tables[table], key, buffers[row], bool(add), levels)


def _check_draws(tables: Tensor) -> None:
    if (tables[..., Field.EPOCH_BYTE] != -1).any():
        raise ValueError(
            "encode draws all grids anew, and a segment keeps its: use encode_changes."
        )


def _check_header(header: list[int]) -> None:
    if len(header) != HEADER_BYTES // 8:
        raise ValueError(f"the header has {len(header)} words: give 4, as Layout.header does.")


def _encode(
    buffer: Tensor,
    table: Tensor,
    key: int,
    header: list[int],
    payload: Tensor,
    levels: Tensor | None,
) -> None:
    """Encode, as ``encode`` does, what is checked."""
    payload.zero_()
    payload[:HEADER_BYTES].copy_(torch.tensor(header).view(torch.uint8))
    for row in table.tolist():
        segment = SegmentRow(row)
        values = segment.values(buffer)
        if segment.bits == 0:
            segment.data(payload).copy_(convert_values(values, segment.wire).view(torch.uint8))
            continue
        codes, low, scale = quantize(values.float(), segment, key, segment.levels(levels))
        segment.meta(payload).copy_(torch.stack((low, scale), dim=1).view(-1).view(torch.uint8))
        segment.data(payload).copy_(pack_codes(codes, segment.bits))


def _decode(
    payload: Tensor, table: Tensor, key: int, buffer: Tensor, add: bool, levels: Tensor | None
) -> None:
    """Decode, as ``decode`` does, what is checked."""
    for row in table.tolist():
        segment = SegmentRow(row)
        if segment.bits == 0:
            values = convert_values(segment.data(payload).clone().view(segment.wire), segment.dtype)
        else:
            meta = segment.meta(payload).clone().view(torch.float32).view(-1, 2)
            codes = unpack_codes(segment.data(payload), segment.bits, segment.numel)
            limit = torch.finfo(segment.dtype).max
            own, epochs = segment.levels(levels), segment.epochs(payload)
            if epochs is not None:
                epochs = epochs.clone().view(torch.int32)
            values = dequantize(codes, meta[:, 0], meta[:, 1], segment, key, own, epochs)
            values = convert_values(values.clamp(-limit, limit), segment.dtype)
        if add:
            values = segment.values(buffer) + values
        segment.store(buffer, values, keep_padding=add)


def codes_on_grid(
    extent: Extent, low: Tensor, scale: Tensor, segment: SegmentRow, r: Tensor
) -> Tensor:
    """The reference codec's codes, fp32 [buckets, bucket], of measured values on a uniform grid."""
    steps = grid_steps(scale.signbit(), segment)
    t = place_on_grid(extent.values, low[:, None], scale[:, None])
    codes = unclamped_codes(t, r, segment.rounding)
    codes = torch.minimum(codes.clamp(min=0), steps[:, None])
    codes = codes.masked_fill(extent.zero, segment.num_codes - 1)
    return codes.masked_fill(extent.is_broken[:, None], 0)


def quantize(
    x: Tensor, segment: SegmentRow, key: int, levels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference codec's codes (uint8 [n]), lows and scales (fp32 [buckets]): [Note: Grid]."""
    extent = measure(x, segment)
    low, scale = draw_grid(extent, segment)
    r = grid_numbers(segment, key, extent.values)
    codes = codes_on_grid(extent, low, scale, segment, r)
    if levels is not None:
        width = scale.abs() * grid_steps(scale.signbit(), segment)
        t = (extent.values - low[:, None]) * (1 / width)[:, None]
        learned = has_learned_levels(low, scale)[:, None]
        codes = torch.where(learned, _level_codes(t, levels, r, segment.rounding), codes)
    return codes.view(-1)[: x.numel()].to(torch.uint8), low, scale


def dequantize(
    codes: Tensor,
    low: Tensor,
    scale: Tensor,
    segment: SegmentRow,
    key: int,
    levels: Tensor | None,
    epochs: Tensor | None = None,
) -> Tensor:
    """The fp32 [n] values that the reference codec makes of uint8 [n] codes: [Note: Grid].

    ``epochs``: int32 [buckets], where grids are kept.
    """
    buckets = low.numel()
    c_NB = torch.nn.functional.pad(codes, (0, buckets * segment.bucket - codes.numel()))
    c_NB = c_NB.view(buckets, segment.bucket)
    place = c_NB.float()
    if segment.rounding.properties.is_taken_back:
        place = place + grid_numbers(segment, key, c_NB, epochs)
    d = scale.abs()
    factor = huge_factor(low, d)
    value = (low * factor)[:, None] + place * (d * factor)[:, None]
    value = value / factor[:, None]
    is_zero = scale.signbit()[:, None] & (c_NB == segment.num_codes - 1)
    value = value.masked_fill(is_zero, 0.0)
    if levels is not None:
        width = scale * float(segment.num_codes - 1)
        by_level = low[:, None] + levels.to(c_NB.device)[c_NB.long()] * width[:, None]
        value = torch.where(has_learned_levels(low, scale)[:, None], by_level, value)
    return value.view(-1)[: codes.numel()]


def grid_numbers(
    segment: SegmentRow, key: int, like_NB: Tensor, epochs: Tensor | None = None
) -> Tensor:
    """What the reference codec's roundings work with: r of [Note: Grid], fp32, on either side.

    It is broadcastable to [buckets, bucket]. A rounding that makes something else of what it draws
    says so here.
    """
    match segment.rounding.properties.drawn:
        case Drawn.A_BUCKET:
            r = segment.uniform(like_NB.shape[0], key, like_NB.device)[:, None]
        case Drawn.A_VALUE:
            numel, device = like_NB.numel(), like_NB.device
            r = segment.uniform(numel, key, device, epochs).view_as(like_NB)
        case Drawn.NOTHING:
            r = torch.zeros(1, 1, device=like_NB.device)
    return r


def unclamped_codes(t_NB: Tensor, r: Tensor, rounding: Rounding) -> Tensor:
    """The reference codec's codes before they are clamped: whole numbers, as it rounds.

    A rounding that rounds in another way says so here.
    """
    if rounding.properties.rounds_down:
        return torch.floor(t_NB + (r + 0.5))
    return torch.round(t_NB - r)


def _level_codes(t: Tensor, levels: Tensor, r: Tensor, rounding: Rounding) -> Tensor:
    """Codes (int64, the shape of t) of values between 0 and 1, see [Note: Grid]."""
    levels = levels.to(t.device)
    last = levels.numel() - 1
    index, step = torch.zeros_like(t, dtype=torch.int64), (last + 1) // 2
    while step:
        index += step * (levels[index + step] <= t)
        step //= 2
    below, above = levels[index], levels[(index + 1).clamp(max=last)]
    if rounding.properties.drawn == Drawn.A_VALUE:
        up = (r + 0.5) * (above - below) < t - below
    else:
        up = above - t < t - below
    return (index + up).clamp(max=last)
