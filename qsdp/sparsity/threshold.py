"""The exact K-th largest magnitude over sharded tensors, without gathering them.

Radix-select on the bit pattern of |w| as fp32, which orders as the magnitudes do: three rounds,
each a histogram of 2048 bins over the next 11, 11 and 9 bits and one all-reduce of it, narrow the
K-th value down to one pattern. bf16 and fp16 values are fp32 values, so they may be mixed.

Entries of exactly that magnitude are kept in global order (the order of the tensors, then the flat
index in the whole tensor) until K are kept, so that the outcome does not depend on the number of
ranks. NaN counts as larger than anything: it is kept, and shows in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.sparsity.shards import Part, by_groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DIGIT_BITS = 11
_NUM_BINS = 1 << _DIGIT_BITS

THRESHOLD_BYTES = 3 * 8 * _NUM_BINS
"""What one threshold over fp32 shards all-reduces on a shard axis: three histograms."""
_KEY_BITS = 31
# Intermediate results of a chunk stay in a CPU's cache; a GPU wants few launches instead.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 24

Chunks = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Threshold:
    """Which entries of a list of shards are kept: those above `keys`, and the first ties."""

    keys: tuple[int, ...]
    """Per shard: bit pattern of the K-th largest |w| as fp32."""
    ties: tuple[int, ...]
    """Per shard: an entry of magnitude `key` is kept if its position in the whole is below this."""

    def keep(self, index: int, shard: Part) -> Tensor:
        """The bool mask, of the local shape, of the entries kept in shard number ``index``."""
        # Everything is kept, or nothing: no pattern is below 0, none above the largest int32.
        key, limit = self.keys[index], self.ties[index]
        values = magnitude_keys(shard.values)
        if limit == shard.numel:
            return values >= key
        keep = values > key
        if limit:
            tied_N = (values == key).flatten().nonzero().squeeze(1)
            keep.view(-1)[tied_N] = shard.positions(tied_N) < limit
        return keep


def global_threshold(shards: Sequence[Part], num_keep: int) -> Threshold:
    """Find the ``num_keep`` entries of largest magnitude over all shards of all tensors.

    A collective over the shards' process groups: one all-reduce of 16 KiB a round, and a few small
    ones when only some of the tied entries are kept. The host waits for the device once for the
    three rounds. Reads every local value three times, and a fourth time for cut ties.

    Args:
        shards: The tensors' local parts, the same tensors in the same order on every rank, each
            tensor once; float32, bfloat16 or float16.
        num_keep: K, from 0 to the number of values in all tensors.

    Raises:
        ValueError: If K is out of range or a dtype is not supported.
    """
    return _thresholds(shards, [0] * len(shards), [num_keep])


def layer_thresholds(shards: Sequence[Part], num_keep: Sequence[int]) -> Threshold:
    """As `global_threshold`, with ``num_keep[i]`` entries of tensor i for themselves.

    One all-reduce a round for all tensors together.
    """
    return _thresholds(shards, list(range(len(shards))), num_keep)


def _thresholds(shards: Sequence[Part], sets: Sequence[int], num_keep: Sequence[int]) -> Threshold:
    """Shard i competes within set number ``sets[i]``, of which ``num_keep[set]`` are kept."""
    for shard in shards:
        if shard.dtype not in DTYPES:
            raise ValueError(
                f"cannot rank magnitudes of {shard.dtype}; use float32, bfloat16 or float16"
            )
    everything, nothing = 0, (1 << _KEY_BITS) - 1
    keys = [everything] * len(shards)
    limits = [shard.numel for shard in shards]
    members = [[i for i, of in enumerate(sets) if of == chosen] for chosen in range(len(num_keep))]
    searched = []
    for indices, count in zip(members, num_keep, strict=True):
        total = sum(shards[i].numel for i in indices)
        if not 0 <= count <= total:
            raise ValueError(f"cannot keep {count} of {total} values; choose 0 to {total}")
        if count == 0:
            for i in indices:
                keys[i], limits[i] = nothing, 0
        elif count < total:
            searched.append((indices, count))
    chosen = [i for indices, _ in searched for i in indices]
    found = _select(
        [_key_chunks(shards[i]) for i in chosen],
        [shards[i] for i in chosen],
        [number for number, (indices, _) in enumerate(searched) for _ in indices],
        [count for _, count in searched],
        _KEY_BITS,
    )
    for (indices, _), (key, num_ties, num_equal) in zip(searched, found, strict=True):
        for i in indices:
            keys[i] = key
        if num_ties != num_equal:
            cut = _tie_limits([shards[i] for i in indices], key, num_ties)
            for i, limit in zip(indices, cut, strict=True):
                limits[i] = limit
    return Threshold(tuple(keys), tuple(limits))


def _tie_limits(shards: Sequence[Part], key: int, num_ties: int) -> tuple[int, ...]:
    """Per shard, the position at which the first ``num_ties`` entries equal to ``key`` end."""
    counts: list[Tensor] = [(magnitude_keys(shard.values) == key).sum() for shard in shards]
    limits = []
    for shard, count in zip(shards, _sum_over_ranks(shards, counts), strict=True):
        if num_ties >= count:
            limits.append(shard.numel)
        elif num_ties <= 0:
            limits.append(0)
        else:
            limits.append(_position_limit(shard, key, num_ties))
        num_ties -= count
    return tuple(limits)


def _position_limit(shard: Part, key: int, num_ties: int) -> int:
    """One past the position of the ``num_ties``-th entry equal to ``key`` in one tensor."""
    tied_N = (magnitude_keys(shard.values) == key).flatten().nonzero().squeeze(1)
    last = shard.numel - 1
    # The smallest positions are the largest distances from the end.
    distances_N = last - shard.positions(tied_N)
    bits = max(last.bit_length(), 1)
    ((distance, _, _),) = _select([lambda: iter([distances_N])], [shard], [0], [num_ties], bits)
    return last - distance + 1


def _select(
    chunks: Sequence[Chunks],
    shards: Sequence[Part],
    sets: Sequence[int],
    num_keep: Sequence[int],
    bits: int,
) -> list[tuple[int, int, int]]:
    """Radix-select in every set S: the ``num_keep[S]``-th largest of integers in [0, 2**bits).

    Returns:
        By set: the value, how many entries equal to it are among the ``num_keep`` largest, and how
        many there are in all.
    """
    if not num_keep:
        return []
    wanted_S = torch.tensor(num_keep, dtype=torch.int64, device=shards[0].device)
    prefix_S: Tensor | None = None
    # Nothing is read back between rounds: a GPU's queue stays full.
    while bits:
        width = min(_DIGIT_BITS, bits)
        bits -= width
        histogram_SB = _histogram(chunks, shards, sets, len(num_keep), prefix_S, bits, width)
        at_least_SB = histogram_SB.flip(1).cumsum(1)
        from_top_S = (at_least_SB < wanted_S[:, None]).sum(1)
        digit_S = _NUM_BINS - 1 - from_top_S
        found_S = histogram_SB.gather(1, digit_S[:, None]).squeeze(1)
        above_S = at_least_SB.gather(1, from_top_S[:, None]).squeeze(1) - found_S
        wanted_S = wanted_S - above_S
        prefix_S = digit_S if prefix_S is None else (prefix_S << width) + digit_S
    assert prefix_S is not None
    rows: list[list[int]] = torch.stack([prefix_S, wanted_S, found_S], dim=1).tolist()
    return [(value, num_ties, num_equal) for value, num_ties, num_equal in rows]


def _histogram(
    chunks: Sequence[Chunks],
    shards: Sequence[Part],
    sets: Sequence[int],
    num_sets: int,
    prefix_S: Tensor | None,
    shift: int,
    width: int,
) -> Tensor:
    """Over all ranks, how often each next digit follows a set's prefix: int64 [sets, 2048]."""
    shape = (num_sets, _NUM_BINS)
    total = torch.zeros(shape, dtype=torch.int64, device=shards[0].device)
    for groups, indices in by_groups(shards).items():
        counts = torch.zeros(shape, dtype=torch.int64, device=shards[indices[0]].device)
        for i in indices:
            prefix = None if prefix_S is None else prefix_S[sets[i]]
            for keys in chunks[i]():
                counts[sets[i]] += _count_digits(keys, prefix, shift, width).to(counts.device)
        for group in groups:
            dist.all_reduce(counts, group=group)
        total += counts.to(total.device)
    return total


def _count_digits(keys: Tensor, prefix: Tensor | None, shift: int, width: int) -> Tensor:
    """Count the digits of the keys that continue ``prefix``, without waiting for a GPU."""
    on_cpu = keys.device.type == "cpu"
    matches = None if prefix is None else (keys >> (shift + width)) == prefix.to(keys.device)
    if on_cpu and matches is not None:
        keys = keys[matches]
    digits = (keys >> shift) & ((1 << width) - 1)
    if on_cpu:
        return torch.bincount(digits, minlength=_NUM_BINS)
    # bincount and a boolean index would wait for their sizes. histc leaves out what is below its
    # range, and its arithmetic is exact for int32.
    if matches is not None:
        digits = torch.where(matches, digits, -1)
    return torch.histc(digits.int(), bins=_NUM_BINS, min=0, max=_NUM_BINS).long()


def _sum_over_ranks(shards: Sequence[Part], counts: Sequence[Tensor]) -> list[int]:
    """Add one int64 count a shard over the ranks that hold the other parts."""
    sums = [0] * len(shards)
    for groups, indices in by_groups(shards).items():
        stacked = torch.stack([counts[i].to(counts[indices[0]].device) for i in indices])
        for group in groups:
            dist.all_reduce(stacked, group=group)
        for i, value in zip(indices, stacked.tolist(), strict=True):
            sums[i] = value
    return sums


def _key_chunks(shard: Part) -> Chunks:
    size = _CHUNK_CPU if shard.device.type == "cpu" else _CHUNK_GPU
    return lambda: (
        magnitude_keys(chunk) for chunk in shard.values.reshape(-1).split(size) if chunk.numel()
    )


def magnitude_keys(values: Tensor) -> Tensor:
    """The bits of |values| as fp32: int32, of the same shape, ordered as the magnitudes are."""
    return values.float().contiguous().view(torch.int32) & 0x7FFFFFFF
