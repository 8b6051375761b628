"""Compiled kernels of changes to kept rows against the specification: the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.segment_table import Field
from qsdp.common.dtypes import TORCH_DTYPES, DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import changes
from tests.support import gpu_kernels
from tests.support.frame_body import parts_of
from tests.support.kept_sender import FLOATS, ROOM, Sender, layout_of, some
from tests.support.kernel_inputs import hard_values

COMPILED = [name for name in native.available() if name != native.PYTHON]
ABSENT = "the native library is not installed: there are only Python kernels to run"
KEEPS = [rounding for rounding in Rounding if rounding.properties.keeps_grids]


@pytest.fixture(
    params=[
        *(COMPILED or [pytest.param("none", marks=pytest.mark.skip(reason=ABSENT))]),
        *gpu_kernels.PARAMS,
    ]
)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with gpu_kernels.serving(request.param):
        yield request.param


every_rounding = pytest.mark.parametrize("rounding", KEEPS, ids=[each.label for each in KEEPS])


@every_rounding
@pytest.mark.parametrize("dtype", FLOATS, ids=[each.name.lower() for each in FLOATS])
def test_changes_have_the_bytes_of_the_specification(kernels, dtype, rounding, generator):
    layout = layout_of(dtype, rounding, generator)
    x = hard_values(layout.num_values, generator).to(TORCH_DTYPES[dtype])
    sender = Sender(layout, x, generator)
    sender.send(redraw_every=4)
    sender.assert_decoded_alike()
    assert sender.num_drawn > 0
    for by in (0.01, 0.2, 0.05):
        sender.modes = torch.randint(3, sender.modes.shape, generator=generator)
        sender.wander(by)
        sender.send(redraw_every=4)
        assert sender.num_changed > 0
    # Other values altogether: zeros, NaNs and ranges come and go.
    sender.x.copy_(hard_values(layout.num_values, generator))
    sender.modes.fill_(changes.FROZEN)
    sender.send(redraw_every=1)
    sender.assert_decoded_alike()


@every_rounding
@pytest.mark.parametrize("dtype", FLOATS, ids=[each.name.lower() for each in FLOATS])
def test_long_segments_are_decoded_as_the_specification_does(kernels, dtype, rounding, generator):
    """By whole units on GPUs, and with epochs of several steps."""
    layout = layout_of(dtype, rounding, generator, lengths=(1024, 2048))
    x = torch.randn(layout.num_values, generator=generator).to(TORCH_DTYPES[dtype])
    x[torch.rand(x.shape, generator=generator) < 1e-3] = 0.0
    sender = Sender(layout, x, generator)
    for _ in range(2):
        sender.send(redraw_every=2)
        sender.wander(0.01)
    sender.assert_decoded_alike()


@every_rounding
def test_small_steps_have_the_bytes_of_the_specification(kernels, rounding, generator):
    """Dozens of them, past many a schedule, in each form that changes have."""
    layout = layout_of(DType.FP32, rounding, generator, lengths=(200, 128))
    sender = Sender(layout, torch.randn(layout.num_values, generator=generator), generator)
    heads: list[int] = []
    rows = changes.kept_rows(sender.table)
    for i in range(30):
        heads += parts_of(sender.send(redraw_every=7).tolist(), rows).heads
        sender.wander(0.01 if i % 8 else 0.1)
    sender.assert_decoded_alike()
    seen = torch.tensor(heads).bincount(minlength=256)
    lists, maps = slice(1, changes.MOST_LISTED + 1), slice(changes.MOST_LISTED + 1, changes.WHOLE)
    for form in (slice(0, 1), lists, maps, slice(changes.WHOLE, 255), slice(changes.DRAWN, 256)):
        assert seen[form].any()


def test_thousands_of_buckets_have_the_bytes_of_the_specification(kernels, generator):
    coded = {"dtype": DType.FP32, "keeps_epochs": True, "rounding": KEEPS[0], "bucket": 8}
    segments = [Segment(bits=4, padded=8_500 * 8, parameter=0, **coded)]
    segments.append(Segment(bits=0, dtype=DType.FP32, padded=20_000, parameter=1, wire=DType.BF16))
    segments.append(Segment(bits=2, padded=333, parameter=2, **coded))
    layout = Layout(segments, group=1)
    sender = Sender(layout, torch.randn(layout.num_values, generator=generator), generator)
    for _ in range(2):
        sender.send(redraw_every=200)
        sender.wander(0.05)
    assert sender.num_changed > 1_000


def test_nothing_is_sent_again_in_the_same_step(kernels, generator):
    layout = layout_of(DType.BF16, KEEPS[0], generator)
    x = hard_values(layout.num_values, generator).bfloat16()
    sender = Sender(layout, x, generator)
    sender.send(redraw_every=1)
    for modes in (changes.TRAINED, changes.FROZEN, changes.STILL):
        sender.modes.fill_(modes)
        body = sender.send(redraw_every=1)
        assert body.tolist() == [0] * -(-len(sender.modes) // 8)
    sender.step += 1
    sender.x.neg_()
    assert sender.send(redraw_every=1).tolist() == body.tolist(), "it was looked at"


def test_a_single_raw_value_that_changed_is_sent(kernels, generator):
    raw = {"bits": 0, "dtype": DType.FP32}
    segments = [
        Segment(padded=padded, parameter=i, wire=wire, **raw)
        for i, (padded, wire) in enumerate(((9_000, DType.FP32), (77, DType.BF16)))
    ]
    sender = Sender(Layout(segments, 0), torch.zeros(9_077), generator)
    sender.send(redraw_every=1)
    for start, stop in ((0, 9_000), (9_000, 9_040), (4_096, 4_120)):
        place = start + some(stop - start, generator)
        if place - start < sender.table[int(start >= 9_000), Field.NUMEL]:
            sender.x[place] = 2.0  # one byte of it
            assert len(sender.send(redraw_every=1)) > 1


def test_threads_do_not_change_frames(kernels, generator):
    coded = {"dtype": DType.FP32, "keeps_epochs": True, "rounding": KEEPS[0], "bucket": 120}
    segments = [
        Segment(bits=bits, padded=padded, parameter=bits, **coded)
        for bits, padded in ((4, 70_001), (8, 140_000), (3, 5))
    ]
    raw = Segment(bits=0, dtype=DType.FP32, padded=99_999, parameter=9, wire=DType.BF16)
    layout = Layout([segments[0], raw, *segments[1:]], group=1)
    x = torch.randn(layout.num_values, generator=generator)
    sender = Sender(layout, x, generator)
    threads = torch.get_num_threads()
    frames = torch.full((3, sender.most_bytes), 0xA7, dtype=torch.uint8)
    counts = torch.zeros(3, 3, dtype=torch.int64)
    rows = torch.empty(3, layout.payload_bytes, dtype=torch.uint8)
    try:
        for step in range(2):
            for i, num_threads in enumerate((1, 2, 5)):
                torch.set_num_threads(num_threads)
                given = (sender.key, sender.kept, sender.modes, step, 200, ROOM, frames[i])
                values = sender.x.view(torch.uint8)
                torch.ops.qsdp.encode_changes(values, sender.table, *given, counts[i])
                rows[i] = sender.kept
                body = frames[i, : counts[i, 0]]
                torch.ops.qsdp.apply_changes(body, sender.table, step, rows[i])
                assert torch.equal(counts[i], counts[0])
                assert torch.equal(body, frames[0, : counts[0, 0]])
                assert torch.equal(rows[i], rows[0])
            assert counts[0, 1 + (step == 0)] > 1000
            sender.kept.copy_(rows[0])
            sender.x += 1e-2
    finally:
        torch.set_num_threads(threads)
