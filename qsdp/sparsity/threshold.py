"""The exact K-th largest magnitude over sharded tensors, without gathering them.

Radix-select on the bit pattern of |w| as fp32, which orders as the magnitudes do: three rounds,
each a histogram of 2048 bins over the next 11, 11 and 9 bits and one all-reduce of it, narrow the
K-th value down to one pattern. bf16 and fp16 values are fp32 values, so they may be mixed.

Entries of exactly that magnitude are kept in global order (the order of the tensors, then the flat
index in the whole tensor) until K are kept, so that the outcome does not depend on the number of
ranks. NaN counts as larger than anything: it is kept, and shows in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp.codec.magnitude import DIGIT_BITS, DTYPES, KEY_BITS, NUM_BINS, keys_of
from qsdp.sparsity.shards import Part, by_groups

THRESHOLD_BYTES = 3 * 8 * NUM_BINS
"""What one threshold over fp32 shards all-reduces on a shard axis: three histograms."""


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
        values_N = _flat(shard)
        keep_N = torch.empty_like(values_N, dtype=torch.bool)
        torch.ops.qsdp.mark_above(values_N, key - 1 if limit == shard.numel else key, keep_N)
        if 0 < limit < shard.numel:
            tied_N = _tied(shard, key)
            keep_N[tied_N] = shard.positions(tied_N) < limit
        return keep_N.view(shard.values.shape)


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
    everything, nothing = 0, (1 << KEY_BITS) - 1
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
        lambda place: _flat(shards[chosen[place]]),
        [shards[i] for i in chosen],
        [number for number, (indices, _) in enumerate(searched) for _ in indices],
        [count for _, count in searched],
        KEY_BITS,
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
    counts: list[Tensor] = [(keys_of(shard.values) == key).sum() for shard in shards]
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
    last = shard.numel - 1
    # The smallest positions are the largest distances from the end.
    distances_N = last - shard.positions(_tied(shard, key))
    bits = max(last.bit_length(), 1)
    ((distance, _, _),) = _select(lambda _: distances_N, [shard], [0], [num_ties], bits)
    return last - distance + 1


def _select(
    read: Callable[[int], Tensor],
    shards: Sequence[Part],
    sets: Sequence[int],
    num_keep: Sequence[int],
    bits: int,
) -> list[tuple[int, int, int]]:
    """Radix-select in every set S: the ``num_keep[S]``-th largest of keys in [0, 2**bits).

    Args:
        read: By the shard's place, its values: contiguous, 1-D; see qsdp/codec/magnitude.py for
            their keys. One is held at a time, which may be all that memory has room for.

    Returns:
        By set: the value, how many entries equal to it are among the ``num_keep`` largest, and how
        many there are in all.
    """
    if not num_keep:
        return []
    wanted_S = torch.tensor(num_keep, dtype=torch.int64, device=shards[0].device)
    prefix_S = torch.zeros_like(wanted_S)
    # Nothing is read back between rounds: a GPU's queue stays full.
    while bits:
        width = min(DIGIT_BITS, bits)
        bits -= width
        histogram_SB = _histogram(read, shards, sets, prefix_S, bits, width)
        at_least_SB = histogram_SB.flip(1).cumsum(1)
        from_top_S = (at_least_SB < wanted_S[:, None]).sum(1)
        digit_S = NUM_BINS - 1 - from_top_S
        found_S = histogram_SB.gather(1, digit_S[:, None]).squeeze(1)
        above_S = at_least_SB.gather(1, from_top_S[:, None]).squeeze(1) - found_S
        wanted_S = wanted_S - above_S
        prefix_S = (prefix_S << width) + digit_S
    rows: list[list[int]] = torch.stack([prefix_S, wanted_S, found_S], dim=1).tolist()
    return [(value, num_ties, num_equal) for value, num_ties, num_equal in rows]


def _histogram(
    read: Callable[[int], Tensor],
    shards: Sequence[Part],
    sets: Sequence[int],
    prefix_S: Tensor,
    shift: int,
    width: int,
) -> Tensor:
    """Over all ranks, how often each next digit follows a set's prefix: int64 [sets, 2048]."""
    shape = (len(prefix_S), NUM_BINS)
    total = torch.zeros(shape, dtype=torch.int64, device=prefix_S.device)
    for groups, indices in by_groups(shards).items():
        counts = torch.zeros(shape, dtype=torch.int64, device=shards[indices[0]].device)
        prefixes = prefix_S.to(counts.device)
        for i in indices:
            at = sets[i]
            torch.ops.qsdp.count_digits(read(i), prefixes[at], shift, width, counts[at])
        for group in groups:
            dist.all_reduce(counts, group=group)
        total += counts.to(total.device)
    return total


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


def _flat(shard: Part) -> Tensor:
    return shard.values.contiguous().view(-1)


def _tied(shard: Part, key: int) -> Tensor:
    """Flat indices of the local values of magnitude ``key``: int64 [N]."""
    return (keys_of(_flat(shard)) == key).nonzero().squeeze(1)
