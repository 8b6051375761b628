"""How long frames of changes are let be, as a function of what all ranks have read."""

from __future__ import annotations

from qsdp.codec.change_frame import FrameSizes, most_body_bytes
from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import DType


def test_the_next_frame_may_be_a_little_longer_than_the_longest_of_the_last_four() -> None:
    sizes = FrameSizes(60, most=100_000)
    assert sizes.expected == 64
    for longest in (1000, 5000, 3000, 100, 100):
        sizes.saw(longest)
    assert sizes.expected == 5312
    sizes.saw(100)
    assert sizes.expected == 3200
    sizes.saw(50_000)  # of many counts, whose sum scatters less
    assert sizes.expected == 50_944


def test_no_frame_is_expected_to_be_longer_than_one_can_be() -> None:
    sizes = FrameSizes(100, most=1000)
    sizes.saw(1000)
    assert sizes.expected == 1008  # in steps of 16


def test_a_frame_that_draws_all_is_the_longest() -> None:
    kept = {"dtype": DType.FP32, "bucket": 128, "rounding": 1, "keeps_epochs": True}
    segments = [
        Segment(bits=4, padded=1000, parameter=0, **kept),
        Segment(bits=0, dtype=DType.FP32, padded=7, parameter=1),
        Segment(bits=8, padded=128, parameter=2, **kept),
    ]
    table = Layout(segments, 0).table([1000, 7, 128])
    rows = [SegmentRow(row) for row in table]
    assert most_body_bytes(rows) == 1 + (8 * 9 + 500) + 28 + (9 + 128)
