"""The codec's bytes: generator, keys, packing, layout, equality with an independent reference."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch

from qsdp.codec import random_numbers
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.random_numbers import RandomKey
from qsdp.common.dtypes import DType
from qsdp.config import ROUNDINGS
from qsdp.ops.reference import codec
from tests.support import codec_reference as reference
from tests.support.codec_wire import DTYPES, KEY, LARGEST, fresh, send

BITS = range(2, 9)

# kat_vectors of Random123: rounds, counter, key, output.
PHILOX_KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(low: int, high: int) -> int:
    return struct.unpack("<q", struct.pack("<II", low, high))[0]


def mixed_values(rng: np.random.Generator, num: int, bucket: int) -> torch.Tensor:
    """Buckets of ordinary, offset, tiny, huge, sparse, constant, zero and broken values in turn."""
    x = rng.standard_normal(num).astype(np.float32)
    for number, start in enumerate(range(0, num, bucket)):
        part = x[start : start + bucket]
        match number % 10:
            case 1:
                part += np.float32(1000)
            case 2:
                part *= np.float32(2.0 ** rng.integers(-130, -100))
            case 3:
                part *= np.float32(LARGEST / np.abs(part).max() * 0.99999)
            case 4:
                part[rng.random(part.size) < 0.5] = 0.0
                part[rng.random(part.size) < 0.2] = -0.0
            case 5:
                part[:] = part[0]
            case 6:
                part[:] = 0.0
            case 7:
                part[rng.integers(part.size)] = rng.choice([np.nan, np.inf, -np.inf])
            case 8:
                part *= np.float32(2.0**-144)
            case 9:
                part[:] = np.where(rng.random(part.size) < 0.5, part[0], 0.0)
    return torch.from_numpy(x)


# ---- the generator and its keys


@pytest.mark.parametrize(("rounds", "counter", "key", "output"), PHILOX_KNOWN_ANSWERS)
def test_the_reference_generator_gives_random123s_known_answers(rounds, counter, key, output):
    assert reference.philox4x32(words(counter), words(key), rounds) == words(output)


@pytest.mark.parametrize(("rounds", "counter", "key", "output"), PHILOX_KNOWN_ANSWERS[:3])
def test_the_generator_gives_random123s_known_answers(rounds, counter, key, output):
    c0, c1, c2, c3 = words(counter)
    block = torch.tensor([signed(c0, c1)])
    assert random_numbers.ROUNDS == rounds
    assert random_numbers.philox(block, c2, c3, signed(*words(key)))[0].tolist() == words(output)


def test_random_numbers_are_16_bits_a_value_centred_in_their_cells():
    rng = fresh()
    key = int(rng.integers(-(2**63), 2**63))
    parameter, group = (int(n) for n in rng.integers(0, 2**32, 2))
    for num in (0, 1, 7, 8, 9, 1001):
        drawn = random_numbers.uniform(num, parameter, group, key, torch.device("cpu"))
        assert drawn.dtype == torch.float32
        assert np.array_equal(drawn.numpy(), reference.uniforms(num, parameter, group, key))
        assert bool(((drawn.double() + 0.5) * 65536 % 1 == 0.5).all())


def test_a_key_folds_as_promised_into_a_signed_64_bit_integer():
    rng = fresh()
    for _ in range(200):
        key = RandomKey(*(int(n) for n in rng.integers(0, 2**63 - 1, len(RandomKey._fields))))
        assert key.fold() == reference.fold(key)
        assert -(2**63) <= key.fold() < 2**63


@pytest.mark.parametrize("how", ["shift", "dither", "stochastic"])
def test_every_key_field_changes_the_randomness_and_equal_keys_repeat_it(how):
    x = torch.from_numpy(fresh().standard_normal(512).astype(np.float32))
    here = {"bucket": 16, "parameter": 5, "group": 2}
    first = send(x, 6, how, **here)
    assert torch.equal(first.payload, send(x.clone(), 6, how, key=RandomKey(*KEY), **here).payload)
    others = [KEY._replace(**{name: getattr(KEY, name) + 1}) for name in RandomKey._fields]
    others += [KEY._replace(**{name: 1 << 40}) for name in ("seed", "step")]
    others += [KEY._replace(step=KEY.sender, sender=KEY.step), KEY._replace(seed=2**63 - 1)]
    seen = {first.codes}
    for key in others:
        seen.add(send(x, 6, how, key=key, **here).codes)
    seen.add(send(x, 6, how, **{**here, "parameter": 6}).codes)
    seen.add(send(x, 6, how, **{**here, "group": 3}).codes)
    seen.add(send(x, 6, how, **{**here, "parameter": 2, "group": 5}).codes)
    assert len(seen) == 1 + len(others) + 3


def test_nearest_uses_no_randomness():
    x = torch.from_numpy(fresh().standard_normal(100).astype(np.float32))
    other = RandomKey(*(field + 1 for field in KEY))
    sent = send(x, 4, "nearest")
    assert sent.codes == send(x, 4, "nearest", key=other, parameter=9).codes
    assert torch.equal(sent.values, send(x, 4, "nearest", receiver_key=other).values)


# ---- the bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("bits", BITS)
def test_bytes_and_values_equal_the_references(bits, how, dtype):
    rng = fresh()
    bucket = 24
    key = RandomKey(*(int(n) for n in rng.integers(0, 2**31, len(RandomKey._fields))))
    x = mixed_values(rng, 10 * bucket + int(rng.integers(1, bucket)), bucket).to(dtype)
    sent = send(x, bits, how, key=key, bucket=bucket, parameter=11, group=4)
    meta, codes, values = reference.encode_segment(
        x.float().numpy(), bits, bucket, how, 11, 4, reference.fold(key)
    )
    assert sent.meta == meta
    assert sent.codes == codes
    limit = torch.finfo(dtype).max
    expected = torch.from_numpy(values).clamp(-limit, limit).to(dtype)
    assert torch.equal(sent.values.isnan(), expected.isnan())
    same = sent.values.view(torch.uint8), expected.view(torch.uint8)
    live = ~expected.isnan().repeat_interleave(dtype.itemsize)
    assert torch.equal(same[0][live], same[1][live])


@pytest.mark.parametrize("bits", BITS)
def test_lengths_around_every_boundary_waste_less_than_a_byte_a_segment(bits):
    rng = fresh()
    for num in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65):
        x = torch.from_numpy(rng.standard_normal(num).astype(np.float32))
        sent = send(x, bits, bucket=16)
        meta, codes, values = reference.encode_segment(
            x.numpy(), bits, 16, "shift", 5, 2, reference.fold(KEY)
        )
        assert (sent.meta, sent.codes) == (meta, codes)
        assert torch.equal(sent.values, torch.from_numpy(values))
        assert 0 <= 8 * len(codes) - num * bits < 8
        metadata = 8 * -(-num // 16)
        codes_from = -(-(32 + metadata) // 16) * 16
        assert sent.payload.numel() == -(-(codes_from + -(-num * bits // 8)) // 16) * 16
        stream = bytes(sent.payload[codes_from:].tolist())
        unused = int.from_bytes(stream, "little") >> num * bits
        assert unused == 0, "bits after the last code are not zero"


def test_codes_are_a_little_endian_bit_stream_of_values_in_order():
    for bits in BITS:
        top = 2**bits - 1
        x = torch.arange(1.0, top + 2)
        assert send(x, bits, "nearest", bucket=256).codes == reference.pack(range(top + 1), bits)
        meta = send(x, bits, "nearest", bucket=256).meta
        assert struct.unpack("<ff", meta) == pytest.approx((1.0, 1.0), rel=1e-6)


def group_layout() -> Layout:
    """Raw and coded segments of odd lengths, mixed."""
    fp32 = {"dtype": DType.FP32}
    return Layout(
        [
            Segment(bits=0, wire=DType.BF16, padded=5, parameter=0, **fp32),
            Segment(bits=3, padded=37, parameter=1, bucket=16, rounding=1, **fp32),
            Segment(bits=0, wire=DType.FP32, padded=3, parameter=2, **fp32),
            Segment(bits=8, padded=50, parameter=3, bucket=32, rounding=0, **fp32),
            Segment(bits=5, padded=0, parameter=4, bucket=8, rounding=2, **fp32),
            Segment(bits=0, wire=DType.FP32, padded=0, parameter=5, **fp32),
        ],
        group=9,
    )


def test_a_payload_is_header_metadata_raw_wider_first_then_codes_from_a_16_byte_boundary():
    layout = group_layout()
    rng = fresh()
    x = torch.from_numpy(rng.standard_normal(95).astype(np.float32))
    payload = torch.full((layout.payload_bytes,), 0x5A, dtype=torch.uint8)
    table = torch.tensor(layout.table([5, 37, 3, 50, 0, 0]))
    codec.encode(x.view(torch.uint8), table, KEY.fold(), layout.header(3, 77), payload)
    parts = x[:5], x[5:42], x[42:45], x[45:]
    dither = reference.encode_segment(parts[1].numpy(), 3, 16, "dither", 1, 9, reference.fold(KEY))
    shift = reference.encode_segment(parts[3].numpy(), 8, 32, "shift", 3, 9, reference.fold(KEY))
    expected = struct.pack("<IIqqq", 3, 3, 77, layout.payload_bytes, layout.hash)
    expected += dither[0] + shift[0]
    expected += parts[2].numpy().tobytes()
    expected += bytes(parts[0].bfloat16().view(torch.uint8).tolist())
    expected += bytes(-len(expected) % 16)
    expected += dither[1] + shift[1]
    expected += bytes(-len(expected) % 16)
    assert bytes(payload.tolist()) == expected

    out = torch.full((95,), 99.0)
    codec.decode(payload, table, KEY.fold(), out.view(torch.uint8))
    assert torch.equal(out[:5], parts[0].bfloat16().float())
    assert torch.equal(out[42:45], parts[2])
    assert np.array_equal(out[5:42].numpy(), dither[2])
    assert np.array_equal(out[45:].numpy(), shift[2])


def test_a_plan_hash_changes_with_everything_that_changes_the_bytes():
    base = {"bits": 4, "dtype": DType.FP32, "padded": 64, "parameter": 1}
    changes = [
        {"bits": 5}, {"dtype": DType.BF16}, {"padded": 65}, {"parameter": 2}, {"bucket": 8},
        {"rounding": 1}, {"wire": DType.BF16}, {"levels": 0}, {"levels": 16},
    ]  # fmt: skip
    layouts = [Layout([Segment(**base)], 0), Layout([Segment(**base)], 1), Layout([], 0)]
    layouts += [Layout([Segment(**{**base, **change})], 0) for change in changes]
    layouts += [Layout([Segment(**base), Segment(**base)], 0)]
    assert len({layout.hash for layout in layouts}) == len(layouts)
    assert Layout([Segment(**base)], 0).hash == layouts[0].hash
    assert all(-(2**63) <= layout.hash < 2**63 for layout in layouts)


def test_a_plan_hash_is_one_of_plain_integers_in_an_order_of_its_own():
    layout = Layout([Segment(bits=4, dtype=DType.BF16, padded=64, parameter=7, rounding=1)], 5)
    integers = [3, 5, 4, 1, 0, 64, 7, 1024, 1, -1]
    digest = hashlib.blake2b(struct.pack("<10q", *integers), digest_size=8).digest()
    assert layout.hash == struct.unpack("<q", digest)[0]
    kept = dataclasses.replace(layout.segments[0], keeps_epochs=True)
    assert kept.definition == (*layout.segments[0].definition, 1)
    turned = dataclasses.replace(kept, rotates_in=256)
    assert turned.definition == (*kept.definition, 2, 256)
    assert len(turned.definition) == len(dataclasses.fields(Segment)) + 1  # which field it is of


@pytest.mark.parametrize("how", ROUNDINGS)
def test_padding_is_neither_measured_nor_coded_and_decodes_to_zero(how):
    x = torch.from_numpy(fresh().standard_normal(150).astype(np.float32))
    for numel in (0, 1, 63, 64, 65, 149):
        alone = send(x[:numel].clone(), 5, how)
        for poison in (torch.nan, torch.inf, 1e30, 0.0):
            padded = x.clone()
            padded[numel:] = poison
            sent = send(padded, 5, how, numel=numel)
            assert (sent.meta, sent.codes) == (alone.meta, alone.codes)
            assert torch.equal(sent.values[:numel], alone.values)
            assert bool((sent.values[numel:].view(torch.int32) == 0).all())


def test_decode_and_add_adds_in_fp32_and_leaves_the_padding():
    rng = fresh()
    for dtype in DTYPES:
        x = torch.from_numpy(rng.standard_normal(80).astype(np.float32)).to(dtype)
        sent = send(x, 4, "stochastic", numel=70, out=torch.float32)
        segment = Segment(
            bits=4, dtype=DTYPES[dtype], padded=80, parameter=5, bucket=64, rounding=2
        )
        table = torch.tensor(Layout([segment], 2).table([70], DType.FP32))
        start = torch.from_numpy(rng.standard_normal(80).astype(np.float32))
        total = start.clone()
        codec.decode(sent.payload, table, KEY.fold(), total.view(torch.uint8), True)
        assert torch.equal(total[:70], start[:70] + sent.values[:70])
        assert torch.equal(total[70:], start[70:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_segments_arrive_bit_for_bit(dtype):
    bits_16 = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits_16.view(dtype) if dtype.itemsize == 2 else bits_16.repeat_interleave(2).view(dtype)
    segment = Segment(
        bits=0, dtype=DTYPES[dtype], wire=DTYPES[dtype], padded=x.numel(), parameter=0
    )
    layout = Layout([segment], 0)
    table = torch.tensor(layout.table([x.numel() - 1]))
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    codec.encode(x.view(torch.uint8), table, 0, layout.header(0, 0), payload)
    out = torch.ones_like(x)
    codec.decode(payload, table, 0, out.view(torch.uint8))
    assert torch.equal(out.view(torch.uint8)[: -x.itemsize], x.view(torch.uint8)[: -x.itemsize])
    assert bool((out.view(torch.uint8)[-x.itemsize :] == 0).all())


def test_opaque_bytes_arrive_as_they_are_at_any_offset():
    segments = [
        Segment(bits=0, dtype=DType.OPAQUE, wire=DType.OPAQUE, padded=n, parameter=n)
        for n in (3, 256, 1)
    ]
    layout = Layout(segments, 0)
    x = torch.from_numpy(fresh().integers(0, 256, 260, dtype=np.uint8))
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    table = torch.tensor(layout.table([3, 256, 1]))
    codec.encode(x, table, 0, layout.header(0, 0), payload)
    out = torch.empty_like(x)
    codec.decode(payload, table, 0, out)
    assert torch.equal(out, x)
