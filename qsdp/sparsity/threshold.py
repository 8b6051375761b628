"""The exact K-th largest magnitude over sharded tensors, without gathering them.

Radix-select on the bit pattern of |w| as fp32, which orders as the magnitudes do: three rounds,
each a histogram of 2048 bins over the next 11, 11 and 9 bits and one all-reduce of it, narrow the
K-th value down to one pattern. bf16 and fp16 values are fp32 values, so they may be mixed.

Entries of exactly that magnitude are kept in global order (the order of the tensors, then the flat
index in the whole tensor) until K are kept, so that the outcome does not depend on the number of
ranks. Where ranks have tensors of their own under one name (experts), all of these compete, in the
order of their ranks. NaN counts as larger than anything: it is kept, and shows in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import ops
from qsdp.common.meshes import Groups
from qsdp.common.spread import Reach
from qsdp.compat.torch_collectives import all_gather_over_groups
from qsdp.ops.reference.magnitude import DIGIT_BITS, DTYPES, KEY_BITS, NUM_BINS, keys_of
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.local_shards import LocalShardLike, shard_without_copies

THRESHOLD_BYTES = 3 * 8 * NUM_BINS
"""What one threshold over fp32 shards all-reduces on a shard axis: three histograms."""


@dataclass(frozen=True)
class Threshold:
    """A threshold: which entries of shards are kept, those above ``keys`` and the first ties."""

    keys: tuple[int, ...]
    """The bit pattern of the K-th largest |w| as fp32, for each shard."""
    ties: tuple[int, ...]
    """The position in each shard's whole below which an entry of magnitude ``key`` is kept."""

    def keep(self, index: int, shard: LocalShardLike) -> Tensor:
        """The bool mask, of the local shape, of the entries kept in shard number ``index``."""
        # Everything is kept, or nothing: no pattern is below 0, none above the largest int32.
        key, limit = self.keys[index], self.ties[index]
        values_N = _flat_values(shard)
        keep_N = torch.empty_like(values_N, dtype=torch.bool)
        ops.mark_above(values_N, key - 1 if limit == shard.numel else key, keep_N)
        if 0 < limit < shard.numel:
            tied_N = _tied(shard, key)
            keep_N[tied_N] = shard.positions(tied_N) < limit
        return keep_N.view(shard.values.shape)


def global_threshold(shards: Sequence[LocalShardLike], num_keep: int) -> Threshold:
    """The threshold of the ``num_keep`` entries of largest magnitude over all tensors.

    A collective over the shards' reach: one all-reduce of 16 KiB a round, and a few small ones when
    only some of the tied entries are kept. The host waits for the device once for the three rounds.
    Reads every local value three times, and a fourth time for cut ties.

    Args:
        shards: The tensors' local parts, the same tensors in the same order on every rank, each
            tensor once; float32, bfloat16 or float16.
        num_keep: K, from 0 to the ``num_values_competing`` in all tensors.

    Raises:
        ValueError: K is out of range or a dtype is not supported.
    """
    sets, reaches = [0] * len(shards), [shard.reach for shard in shards]
    return _thresholds(shards, sets, [num_keep], [num_values_competing(shards)], reaches)


def threshold_of_target(shards: Sequence[LocalShardLike], target: Compression) -> Threshold:
    """The threshold that ``target`` asks for, of the values, or the blocks' sums. A collective."""
    if target.scope == "layer":
        numels = [shard.numel for shard in shards]
        return layer_thresholds(shards, [n - round(target.sparsity * n) for n in numels])
    shards = [shard_without_copies(shard) for shard in shards]
    total = num_values_competing(shards)
    return global_threshold(shards, total - round(target.sparsity * total))


def num_values_competing(shards: Sequence[LocalShardLike]) -> int:
    """How many values one threshold is over: in all tensors, and in others' under the same names.

    A collective where there are such.
    """
    spread = [shard for shard in shards if shard.reach.groups != shard.groups]
    own = [torch.tensor(shard.values.numel(), device=shard.device) for shard in spread]
    everywhere = _sum_over_ranks(own, [shard.reach for shard in spread])
    return sum(everywhere) + sum(s.numel for s in shards if s.reach.groups == s.groups)


def layer_thresholds(shards: Sequence[LocalShardLike], num_keep: Sequence[int]) -> Threshold:
    """A threshold for each tensor, as ``global_threshold``, with ``num_keep[i]`` of tensor i.

    One all-reduce a round for all tensors together.
    """
    totals = [shard.numel for shard in shards]
    return _thresholds(shards, list(range(len(shards))), num_keep, totals, _own_reaches(shards))


def _thresholds(
    shards: Sequence[LocalShardLike],
    sets: Sequence[int],
    num_keep: Sequence[int],
    totals: Sequence[int],
    reaches: Sequence[Reach],
) -> Threshold:
    """Find thresholds where shard i competes within set number ``sets[i]``.

    ``num_keep[set]`` of the set's ``totals[set]`` values are kept, with all that is in its reach.
    """
    for shard in shards:
        if shard.dtype not in DTYPES:
            raise ValueError(
                f"cannot rank magnitudes of {shard.dtype}: use float32, bfloat16 or float16."
            )
    everything, nothing = 0, (1 << KEY_BITS) - 1
    keys = [everything] * len(shards)
    limits = [shard.numel for shard in shards]
    members = [[i for i, of in enumerate(sets) if of == chosen] for chosen in range(len(num_keep))]
    searched = []
    for indices, count, total in zip(members, num_keep, totals, strict=True):
        if not 0 <= count <= total:
            raise ValueError(f"cannot keep {count} of {total} values: choose 0 to {total}.")
        if count == 0:
            for i in indices:
                keys[i], limits[i] = nothing, 0
        elif count < total:
            searched.append((indices, count))
    chosen = [i for indices, _ in searched for i in indices]
    found = _select(
        lambda place: _flat_values(shards[chosen[place]]),
        [shards[i] for i in chosen],
        [reaches[i] for i in chosen],
        [number for number, (indices, _) in enumerate(searched) for _ in indices],
        [count for _, count in searched],
        KEY_BITS,
    )
    for (indices, _), (key, num_ties, num_equal) in zip(searched, found, strict=True):
        for i in indices:
            keys[i] = key
        if num_ties != num_equal:
            among = [shards[i] for i in indices], [reaches[i] for i in indices]
            cut = _tie_limits(*among, key, num_ties)
            for i, limit in zip(indices, cut, strict=True):
                limits[i] = limit
    return Threshold(tuple(keys), tuple(limits))


def _tie_limits(
    shards: Sequence[LocalShardLike], reaches: Sequence[Reach], key: int, num_ties: int
) -> tuple[int, ...]:
    """The position in each shard at which the first ``num_ties`` entries equal to ``key`` end."""
    limits = []
    for shard, reach, ties in zip(shards, reaches, _ties(shards, reaches, key), strict=True):
        limit = 0
        for first_rank, count in sorted(ties.items()):
            if first_rank == reach.first_rank and num_ties > 0:
                is_cut = num_ties < count
                limit = _position_limit(shard, key, num_ties) if is_cut else shard.numel
            num_ties -= count
        limits.append(limit)
    return tuple(limits)


def _ties(
    shards: Sequence[LocalShardLike], reaches: Sequence[Reach], key: int
) -> list[dict[int, int]]:
    """How many entries are equal to ``key`` in each shard's tensor, by the first rank that has it.

    Those that other ranks have under its name are included.
    """
    counts = [(keys_of(shard.values) == key).sum() for shard in shards]
    own = _sum_over_ranks(counts, _own_reaches(shards))
    found = [{reach.first_rank: count} for reach, count in zip(reaches, own, strict=True)]
    for i, (shard, reach) in enumerate(zip(shards, reaches, strict=True)):
        if reach.groups != shard.groups:
            mine = torch.tensor([reach.first_rank, reach.is_counted * int(counts[i])])
            found[i] = {}
            for rank, count in (
                all_gather_over_groups(mine.to(shard.device), reach.groups).view(-1, 2).tolist()
            ):
                found[i][rank] = found[i].get(rank, 0) + count
    return found


def _position_limit(shard: LocalShardLike, key: int, num_ties: int) -> int:
    """One past the position of the ``num_ties``-th entry equal to ``key`` in one tensor."""
    last = shard.numel - 1
    # The smallest positions are the largest distances from the end.
    distances_N = last - shard.positions(_tied(shard, key))
    bits = max(last.bit_length(), 1)
    ((distance, _, _),) = _select(
        lambda _: distances_N, [shard], _own_reaches([shard]), [0], [num_ties], bits
    )
    return last - distance + 1


def _select(
    read: Callable[[int], Tensor],
    shards: Sequence[LocalShardLike],
    reaches: Sequence[Reach],
    sets: Sequence[int],
    num_keep: Sequence[int],
    bits: int,
) -> list[tuple[int, int, int]]:
    """Radix-select in every set S: the ``num_keep[S]``-th largest of keys in [0, 2**bits).

    Args:
        read: Gives a shard's values by its place: contiguous, 1-D; ``ops.reference.magnitude`` has
            their keys. One is held at a time, which may be all that memory has room for.

    Returns:
        For each set the value, how many entries equal to it are among the ``num_keep`` largest, and
        how many there are in all.
    """
    if not num_keep:
        return []
    wanted_S = torch.tensor(num_keep, dtype=torch.int64, device=shards[0].device)
    prefix_S = torch.zeros_like(wanted_S)
    # Nothing is read back between rounds: a GPU's queue stays full.
    while bits:
        width = min(DIGIT_BITS, bits)
        bits -= width
        histogram_SB = _histogram(read, shards, reaches, sets, prefix_S, bits, width)
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
    shards: Sequence[LocalShardLike],
    reaches: Sequence[Reach],
    sets: Sequence[int],
    prefix_S: Tensor,
    shift: int,
    width: int,
) -> Tensor:
    """int64 [sets, 2048]: how often each next digit follows a set's prefix, over all ranks."""
    shape = (len(prefix_S), NUM_BINS)
    total = torch.zeros(shape, dtype=torch.int64, device=prefix_S.device)
    for groups, indices in _by_groups(reaches).items():
        counts = torch.zeros(shape, dtype=torch.int64, device=shards[indices[0]].device)
        prefixes = prefix_S.to(counts.device)
        for i in (i for i in indices if reaches[i].is_counted):
            at = sets[i]
            ops.count_digits(read(i), prefixes[at], shift, width, counts[at])
        for group in groups:
            dist.all_reduce(counts, group=group)
        total += counts.to(total.device)
    return total


def _by_groups(reaches: Sequence[Reach]) -> dict[Groups, list[int]]:
    """Indices of what is counted over the same process groups, in one order on every rank."""
    indices: dict[Groups, list[int]] = {}
    for i, reach in enumerate(reaches):
        indices.setdefault(reach.groups, []).append(i)
    return indices


def _sum_over_ranks(counts: Sequence[Tensor], reaches: Sequence[Reach]) -> list[int]:
    """Add up each int64 count over its reach."""
    sums = [0] * len(counts)
    for groups, indices in _by_groups(reaches).items():
        parts = [counts[i] * reaches[i].is_counted for i in indices]
        stacked = torch.stack([part.to(parts[0].device) for part in parts])
        for group in groups:
            dist.all_reduce(stacked, group=group)
        for i, value in zip(indices, stacked.tolist(), strict=True):
            sums[i] = value
    return sums


def _own_reaches(shards: Sequence[LocalShardLike]) -> list[Reach]:
    """The reaches over which the parts of each tensor for itself add up."""
    return [Reach(shard.groups) for shard in shards]


def _flat_values(shard: LocalShardLike) -> Tensor:
    return shard.values.contiguous().view(-1)


def _tied(shard: LocalShardLike, key: int) -> Tensor:
    """Flat indices of the local values of magnitude ``key``: int64 [N]."""
    return (keys_of(_flat_values(shard)) == key).nonzero().squeeze(1)
