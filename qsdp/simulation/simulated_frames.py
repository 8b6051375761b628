"""How long the frames of changes are that the simulated ranks would send (``gather="delta"``).

Written from [Note: Changes] in ops/reference/changes.py, apart from its kernels: lengths follow
from codes and grids, and no frame is made. How many bytes ranks send of frames of some lengths says
[Note: Frame], whose arithmetic is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsdp.codec.change_frame import (
    FRAME_HEADER_BYTES,
    FrameSizes,
    bitmap_bytes,
    counts_bytes,
    counts_in_nibbles,
    most_body_bytes,
)
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.checksum import checksum

Place = tuple[str, int]
"""A parameter, and a rank in the shard group."""
_GRID_BYTES = 8


class _Sent(NamedTuple):
    """What the ranks have sent of one group."""

    step: int
    """In which its last frames were that brought changes: those of the step's first gather."""
    sizes: FrameSizes
    """What the next ones are let be; it is not changed any more."""
    expected: int
    """Bytes that each rank sent at once of its last one."""
    lengths: dict[int, int]
    """Of the last ones, by rank of the shard group."""
    more: int
    """Bytes that each sends of a further frame in a step, by which nothing has changed."""


class SimulatedFrames:
    """The simulated frames of all groups, by their lengths.

    What was sent last is kept to compare: a byte a coded weight, a checksum of what travels as it
    is. Nothing is decoded of it.
    """

    def __init__(self) -> None:
        self._codes: dict[int, dict[Place, Tensor]] = {}
        self._raw: dict[int, dict[Place, int]] = {}
        self._sent: dict[int, _Sent] = {}
        self._said: dict[int, dict[int, list[tuple[SegmentRow, int]]]] = {}

    def forget(self, group: int) -> None:
        """Let the next frames of a group be first ones."""
        for kept in (self._codes, self._raw, self._sent, self._said):
            kept.pop(group, None)

    def say_codes(
        self, group: int, place: Place, row: SegmentRow, codes: Tensor, is_drawn: Tensor
    ) -> None:
        """Note the codes of a shard, uint8 [buckets, bucket], with bool [buckets]: drawn anew."""
        codes = codes.reshape(-1)[: row.numel]
        last = self._codes.setdefault(group, {})
        before = last.get(place, torch.zeros_like(codes))
        last[place] = codes
        self._say(group, place, row, changed_bytes(row, codes, before, is_drawn))

    def say_raw(self, group: int, place: Place, row: SegmentRow, values: Tensor) -> None:
        """Note the values of a shard that travels as it is, as they arrive."""
        last, content = self._raw.setdefault(group, {}), checksum([values])
        is_new = last.get(place) != content
        last[place] = content
        self._say(group, place, row, row.data_bytes * is_new)

    def _say(self, group: int, place: Place, row: SegmentRow, num_bytes: int) -> None:
        said = self._said.setdefault(group, {})
        said.setdefault(place[1], []).append((row, num_bytes))

    def end_gather(self, step: int, num_parameters: Callable[[int], int]) -> None:
        """End a gather of all groups in ``step`` that have said something.

        ``num_parameters`` says of a group how many it has.
        """
        for group, by_rank in self._said.items():
            head = FRAME_HEADER_BYTES + bitmap_bytes(num_parameters(group))
            rows = [[row for row, _ in said] for said in by_rank.values()]
            # Of rows with no more than these the bitmap has no byte more than the group's.
            most = max(most_body_bytes(each) - bitmap_bytes(len(each)) for each in rows) + head
            raw = max(sum(row.data_bytes for row in each if not row.bits) for each in rows)
            lengths = {rank: head + sum(num for _, num in said) for rank, said in by_rank.items()}
            sent, more = self._sent.get(group), FrameSizes(head, most).expected
            if sent is None:
                sizes = FrameSizes(head + raw + most // 16, most)
                self._sent[group] = _Sent(step, sizes, most, lengths, more)
            elif sent.step != step:
                sizes = deepcopy(sent.sizes)
                expected = sizes.expected
                sizes.saw(max(lengths.values()))
                self._sent[group] = _Sent(step, sizes, expected, lengths, more)
        self._said = {}

    def sent_bytes(self, group: int, gathers: int, ranks: Iterable[int]) -> int | None:
        """Bytes that each of ``ranks`` sends of its frames in a step with so many gathers.

        The first is the last one of the group that there was; None before. What does not fit is
        sent behind by all ranks that exchange frames, which are ``ranks`` of the shard group.
        """
        sent = self._sent.get(group)
        if sent is None:
            return None
        longest = max(sent.lengths.get(rank, 0) for rank in ranks)
        return max(sent.expected, longest) + (gathers - 1) * sent.more

    def rewind_point(self) -> Callable[[Collection[int | None]], None]:
        """A function that takes back what was sent since, but of the groups that it is given."""
        undo = [_rewinding(self._codes), _rewinding(self._raw), _rewinding(self._sent)]

        def rewind(gathered: Collection[int | None]) -> None:
            for each in undo:
                each(gathered)

        return rewind


def _rewinding(now: dict[int, Any]) -> Callable[[Collection[int | None]], None]:
    before = {group: copy(own) for group, own in now.items()}

    def rewind(gathered: Collection[int | None]) -> None:
        for group in {*now, *before} - {*gathered}:
            now.pop(group, None)
            if group in before:
                now[group] = before[group]

    return rewind


def changed_bytes(row: SegmentRow, codes: Tensor, before: Tensor, is_drawn: Tensor) -> int:
    """Bytes of a body that say how a coded shard has changed: its counts, and their data.

    Args:
        row: The kept row of the shard.
        codes, before: uint8 [values], those of now and those that were sent last.
        is_drawn: bool [buckets], whose grids are other ones now.
    """
    numel, bucket, num = row.numel, row.bucket, is_drawn.numel()
    by = torch.zeros(num * bucket, dtype=torch.int64, device=codes.device)
    by[:numel] = (codes.long() - before.long()).abs()
    by = by.view(num, bucket)
    places = torch.full((num,), bucket, device=codes.device)
    places[-1] = numel - (num - 1) * bucket
    entries, changed = by.sum(1), (by > 0).sum(1)
    whole = _up(places * row.bits)
    if counts_in_nibbles(row):
        most_listed, room = 11, torch.where(changed <= 24, 24, 64)
    else:
        most_listed, room = 125, changed
    can_map = (by.amax(1) <= 2) & (changed <= room)
    listed = torch.where(entries <= most_listed, entries, whole + 1)
    mapped = torch.where(can_map, _up(places) + _up(2 * room), whole + 1)
    data = torch.where(entries > 0, torch.minimum(torch.minimum(listed, mapped), whole), 0)
    data = torch.where(is_drawn, _GRID_BYTES + whole, data)
    is_said = bool(is_drawn.any()) or bool(changed.any())
    return counts_bytes(row) + int(data.sum()) if is_said else 0


def _up(bits: Tensor) -> Tensor:
    """Whole bytes of so many bits."""
    return (bits + 7) // 8
