"""What the codec tests share: a payload of one parameter, and fresh inputs that can be repeated.

The specification is called directly: torch.ops.qsdp runs the native kernels where they are built.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qsdp.codec.payload import HEADER_BYTES, META_BYTES, Layout, Segment
from qsdp.codec.random_numbers import RandomKey
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops.reference import codec

UNBIASED = tuple(each.label for each in Rounding if not each.properties.is_biased)
DTYPES = {torch.float32: DType.FP32, torch.bfloat16: DType.BF16, torch.float16: DType.FP16}
KEY = RandomKey(seed=7, step=3, direction=0, stage=0, occurrence=0, sender=1)
LARGEST = float(np.finfo(np.float32).max)


def fresh() -> np.random.Generator:
    """A generator with a new seed; pytest shows the seed when the test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"inputs drawn from np.random.default_rng({seed})")
    return np.random.default_rng(seed)


def segments_of_sizes(sizes: dict[int, int]) -> list[Segment]:
    """A coded fp32 segment for each number of bits; their buckets and roundings vary."""
    return [
        Segment(
            bits=bits,
            dtype=DType.FP32,
            padded=num_values,
            parameter=bits,
            bucket=bits * 104,
            rounding=bits % len(Rounding),
        )
        for bits, num_values in sizes.items()
    ]


@dataclass
class Sent:
    payload: Tensor  # uint8
    values: Tensor  # what the receiver decodes, [padded]
    meta: bytes
    codes: bytes


def send(
    x: Tensor,
    bits: int,
    how: str = "shift",
    *,
    key: RandomKey = KEY,
    receiver_key: RandomKey | None = None,
    bucket: int = 64,
    parameter: int = 5,
    group: int = 2,
    numel: int | None = None,
    out: torch.dtype | None = None,
    levels: Tensor | None = None,
) -> Sent:
    """Encode and decode ``x`` as a payload's only segment; ``numel`` values are valid.

    ``levels``, fp32 [2**bits], are learned ones; they are passed among other floats.
    """
    numel = x.numel() if numel is None else numel
    x = torch.empty(x.numel(), dtype=x.dtype).copy_(x)  # numpy's strides of 0 cannot be viewed
    segment = Segment(
        bits=bits,
        dtype=DTYPES[x.dtype],
        padded=x.numel(),
        parameter=parameter,
        bucket=bucket,
        rounding=Rounding.of(how),
        levels=-1 if levels is None else 3,
    )
    if levels is not None:
        rubbish = torch.tensor([torch.nan, -7.0, torch.inf])
        levels = torch.cat((rubbish, levels, rubbish))
    layout = Layout([segment], group)
    payload = torch.full((layout.payload_bytes,), 0xA5, dtype=torch.uint8)
    table = torch.tensor(layout.table([numel]))
    header = layout.header(key.sender, key.step)
    before = x.clone()
    codec.encode(x.view(torch.uint8), table, key.fold(), header, payload, levels)
    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8)), "encode changed its input"
    out = out or x.dtype
    values = torch.full((x.numel(),), 99, dtype=out)
    table = torch.tensor(layout.table([numel], DTYPES[out]))
    key = receiver_key or key
    codec.decode(payload, table, key.fold(), values.view(torch.uint8), levels=levels)
    _, data = layout._starts[0]
    meta_end = HEADER_BYTES + META_BYTES * -(-numel // bucket)
    raw = bytes(payload.tolist())
    return Sent(
        payload, values, raw[HEADER_BYTES:meta_end], raw[data : data + -(-numel * bits // 8)]
    )
