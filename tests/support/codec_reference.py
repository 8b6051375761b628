"""An independent codec: numpy scalars and Python integers, one bucket at a time.

Written from the paper (QSDP, arXiv 2302.02390, section 4) and from the promised bytes, to judge the
kernels by. Slow on purpose; it shares no line with them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np

F = np.float32
TINY = F(2.0**-126)
MASK32 = 2**32 - 1


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 7) -> list[int]:
    """Philox4x32 of Salmon et al., SC 2011, figure 3: four 32-bit words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ k, right & MASK32, left >> 32 ^ d ^ m, left & MASK32
        k, m = (k + 0x9E3779B9) & MASK32, (m + 0xBB67AE85) & MASK32
    return [a, b, c, d]


def half_words(num: int, parameter: int, group: int, key: int) -> Iterator[int]:
    """``num`` 16-bit numbers: eight a block, the low half of a word before the high half."""
    key %= 2**64
    for i in range(num):
        if i % 8 == 0:
            block = i // 8
            words = philox4x32(
                [block & MASK32, block >> 32, parameter, group], [key & MASK32, key >> 32]
            )
        word = words[i % 8 // 2]
        yield word >> 16 if i % 2 else word & 0xFFFF


def uniforms(num: int, parameter: int, group: int, key: int) -> np.ndarray:
    """``num`` values (k + 1/2) / 2**16 - 1/2; exact in fp32."""
    return np.array(
        [(k + 0.5) / 65536 - 0.5 for k in half_words(num, parameter, group, key)], dtype=F
    )


def fold(fields: Sequence[int]) -> int:
    """The signed 64-bit key: splitmix64's next() after each field is xored into its state."""
    state = 0
    for field in fields:
        z = ((state ^ field) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return state - 2**64 if state >= 2**63 else state


def grid(bucket: np.ndarray, bits: int) -> tuple[int, np.float32, np.float32, bool]:
    """(steps, low, d, holds a zero) of one bucket of finite fp32 values."""
    live = [x for x in bucket if x != 0]
    has_zero = len(live) < len(bucket)
    steps = 2**bits - (2 if has_zero else 1)
    low, high = (min(live), max(live)) if live else (F(0), F(0))
    d = F(F(high / F(steps)) - F(low / F(steps)))
    return steps, low, d if d >= TINY else F(0), has_zero


def is_huge(low: np.float32, d: np.float32) -> bool:
    return bool(abs(low) > 2.0**120 or d > 2.0**112)


def position(x: np.float32, low: np.float32, d: np.float32) -> np.float32:
    """Where x lies on the grid, in steps, rounded as the promised fp32 arithmetic rounds."""
    if d == 0:
        return F(0)
    factor = F(2.0**-8) if is_huge(low, d) else F(1)
    return F(F(F(x * factor) - F(low * factor)) * F(F(1) / F(d * factor)))


def unclamped_code(x: np.float32, low: np.float32, d: np.float32, r: np.float32, how: str) -> int:
    t = position(x, low, d)
    if how == "stochastic":
        return int(np.floor(F(t + F(r + F(0.5)))))
    return int(np.rint(F(t - r)))


def learned_code(
    x: np.float32,
    low: np.float32,
    width: np.float32,
    levels: np.ndarray,
    r: np.float32,
    how: str,
) -> int:
    """The code of x among non-decreasing levels from 0 to 1."""
    t = F(F(x - low) * F(F(1) / width))
    reached = [j for j, level in enumerate(levels) if level <= t]
    below = reached[-1]
    if below == len(levels) - 1:
        return below
    gap, over = F(levels[below + 1] - levels[below]), F(t - levels[below])
    if how == "nearest":
        return below + bool(F(levels[below + 1] - t) < over)
    return below + bool(F(F(r + F(0.5)) * gap) < over)


def bucket_shifts(
    values: int, bucket: int, how: str, parameter: int, group: int, key: int
) -> np.ndarray:
    """r of every value."""
    if how == "nearest":
        return np.zeros(values, F)
    if how == "shift":
        drawn = uniforms(-(-values // bucket), parameter, group, key)
        return np.repeat(drawn, bucket)[:values]
    return uniforms(values, parameter, group, key)


def encode_segment(
    x: np.ndarray,
    bits: int,
    bucket: int,
    how: str,
    parameter: int,
    group: int,
    key: int,
    levels: np.ndarray | None = None,
) -> tuple[bytes, bytes, np.ndarray]:
    """(metadata, codes, fp32 values that a receiver sees) of fp32 [n]."""
    r = bucket_shifts(len(x), bucket, how, parameter, group, key)
    meta, codes, decoded = b"", [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(x), bucket):
            part = x[start : start + bucket]
            if not np.all(np.isfinite(part)):
                meta += struct.pack("<ff", np.nan, 0.0)
                codes += [0] * len(part)
                decoded += [F(np.nan)] * len(part)
                continue
            steps, low, d, has_zero = grid(part, bits)
            meta += struct.pack("<ff", low, -d if has_zero else d)
            if levels is not None and not has_zero and d > 0 and not is_huge(low, d):
                width = F(d * F(steps))
                for x_i, r_i in zip(part, r[start : start + bucket], strict=True):
                    code = learned_code(x_i, low, width, levels, r_i, how)
                    codes.append(code)
                    decoded.append(F(low + F(levels[code] * width)))
                continue
            factor = F(2.0**-8) if is_huge(low, d) else F(1)
            for x_i, r_i in zip(part, r[start : start + bucket], strict=True):
                if x_i == 0:
                    codes.append(2**bits - 1)
                    decoded.append(F(0))
                    continue
                code = min(max(unclamped_code(x_i, low, d, r_i, how), 0), steps)
                at = F(F(code) + (F(0) if how == "stochastic" else r_i))
                value = F(F(low * factor) + F(at * F(d * factor))) / factor
                codes.append(code)
                decoded.append(np.clip(value, -np.finfo(F).max, np.finfo(F).max))
    return meta, pack(codes, bits), np.array(decoded, dtype=F)


def pack(codes: Sequence[int], bits: int) -> bytes:
    """A little-endian bit stream: one big integer."""
    stream = sum(int(code) << i * bits for i, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def unpack(stream: bytes, bits: int, num: int) -> list[int]:
    whole = int.from_bytes(stream, "little")
    return [whole >> i * bits & 2**bits - 1 for i in range(num)]
