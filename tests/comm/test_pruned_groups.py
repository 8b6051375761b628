"""Layouts of groups under masks: what is pruned whole, and the hash in the headers."""

from __future__ import annotations

import pytest
import torch

from qsdp.codec.payload import Segment
from qsdp.comm.buffers import BufferPool
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.pruned_slices import PrunedSlices, SliceMasks
from qsdp.common import bitmask
from qsdp.common.dtypes import CODEC_DTYPES


def _layout(counts: list[int], dtype: torch.dtype) -> GroupLayout:
    """One parameter of 16 values on each of two ranks, of which ``counts`` are kept."""
    segments = [Segment(bits=8, dtype=CODEC_DTYPES[dtype], padded=16, parameter=0, bucket=8)]
    bits = torch.stack([bitmask.pack(torch.arange(16) < count) for count in counts])
    pruned = PrunedSlices(segments, None, [SliceMasks(bits, 0, counts)])
    return GroupLayout(segments, 3, torch.tensor([[16], [16]]), None, pruned)


@pytest.mark.parametrize("dtype", CODEC_DTYPES)
def test_a_group_may_be_pruned_whole(dtype: torch.dtype) -> None:
    layout = _layout([0, 0], dtype)
    rows = layout.compact(torch.zeros(2, 16, dtype=dtype), BufferPool())
    output = torch.ones(16, dtype=dtype)
    layout.expand(1, rows[1], output)
    assert not output.any()


def test_the_hash_of_a_pruned_layout_follows_what_each_rank_keeps() -> None:
    hashes = {_layout(counts, torch.float32).header(0, 0)[3] for counts in ([5, 9], [9, 5], [5, 8])}
    assert len(hashes) == 3
