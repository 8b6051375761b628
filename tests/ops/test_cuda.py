"""What only a GPU shows of the codec's kernels: streams, graphs, no waiting, sizes above 2**31."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qsdp.codec.change_frame import most_body_bytes
from qsdp.codec.payload import Layout, Segment
from qsdp.common import bitmask
from qsdp.common.dtypes import DType
from qsdp.common.rounding import Rounding
from qsdp.ops import native
from qsdp.ops.reference import changes, codec
from tests.support import patience
from tests.support.gpu_kernels import NO_GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native.has_cuda_kernels(), reason=NO_GPU),
]


class Sent:
    """One segment of random fp32 values on the GPU, with its payload and what is decoded of it."""

    def __init__(self, numel: int, bits: int = 8, num_segments: int = 1) -> None:
        segments = [
            Segment(bits=bits, dtype=DType.FP32, padded=numel // num_segments, parameter=i)
            for i in range(num_segments)
        ]
        layout = Layout(segments, group=0)
        self.table = torch.tensor(layout.table([s.padded for s in segments]))
        self.header = layout.header(sender=0, step=0)
        self.values = torch.randn(layout.num_values, device="cuda")
        self.payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device="cuda")
        self.decoded = torch.zeros_like(self.values)

    def encode(self) -> None:
        buffer = self.values.view(torch.uint8)
        torch.ops.qsdp.encode(buffer, self.table, 5, self.header, self.payload)

    def decode(self, add: bool = False) -> None:
        buffer = self.decoded.view(torch.uint8)
        torch.ops.qsdp.decode(self.payload, self.table, 5, buffer, add)

    def code_all(self) -> None:
        """Both at once, twice over."""
        parts, tables = torch.tensor([[5, 0, 0, 0, 0]] * 2), self.table.unsqueeze(0)
        buffer, payload = self.values.view(1, -1).view(torch.uint8), self.payload.unsqueeze(0)
        torch.ops.qsdp.encode_all(buffer, tables, parts, self.header, payload)
        buffer = self.decoded.view(1, -1).view(torch.uint8)
        torch.ops.qsdp.decode_all(payload, tables, parts, buffer)

    def wanted(self) -> tuple[Tensor, Tensor]:
        """By the specification, on the CPU."""
        payload = torch.zeros(self.payload.shape, dtype=torch.uint8)
        codec.encode(self.values.cpu().view(torch.uint8), self.table, 5, self.header, payload)
        decoded = torch.zeros(self.values.shape)
        codec.decode(payload, self.table, 5, decoded.view(torch.uint8))
        return payload, decoded

    def check(self) -> None:
        payload, decoded = self.wanted()
        assert torch.equal(self.payload.cpu(), payload)
        assert torch.equal(self.decoded.cpu(), decoded)


def test_work_is_done_on_the_current_stream() -> None:
    sent = Sent(1 << 20)
    fresh = torch.randn_like(sent.values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        sent.values.copy_(fresh)
        sent.encode()
        sent.decode()
    assert not stream.query()  # the host did not wait
    assert torch.cuda.current_stream().query()  # and nothing went elsewhere
    stream.synchronize()
    sent.check()


def test_nothing_waits_for_the_gpu() -> None:
    sent = Sent(1 << 20, num_segments=40)
    values = torch.randn(5000, device="cuda")
    counts = torch.zeros(2048, dtype=torch.int64, device="cuda")
    prefix, marks = counts[0].clone(), torch.zeros(5000, dtype=torch.bool, device="cuda")
    mask = torch.arange(5000) % 3 == 0
    bits, spans = bitmask.pack(mask).cuda(), torch.tensor([[0, 5000, 4, 0, 0, int(mask.sum())]])
    kept, back = (torch.empty(4 * n, dtype=torch.uint8, device="cuda") for n in (spans[0, 5], 5000))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent.encode()
        sent.decode()
        sent.decode(add=True)
        sent.code_all()
        torch.ops.qsdp.count_digits(values, prefix, 20, 11, counts)
        torch.ops.qsdp.mark_above(values, 1 << 29, marks)
        torch.ops.qsdp.compact(values.view(torch.uint8), spans, bits, kept, False)
        torch.ops.qsdp.expand(kept, spans, bits, back)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert int(counts.sum()) == 5000
    assert torch.equal(back.view(torch.float32), values * mask.cuda())


def test_a_graph_replays_it() -> None:
    sent = Sent(100_000, bits=4, num_segments=40)  # more segments than a launch takes
    sent.encode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sent.encode()
        sent.decode()
    for _ in range(2):
        sent.values.normal_()
        graph.replay()
        sent.check()


def test_a_graph_replays_many_payloads() -> None:
    sent = Sent(100_000, bits=4, num_segments=40)
    sent.code_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sent.code_all()
    sent.values.normal_()
    graph.replay()
    sent.check()


def test_offsets_above_2_to_the_31() -> None:
    numel = (1 << 29) + (1 << 20)
    if torch.cuda.mem_get_info()[0] < 6 * numel * 4:
        pytest.skip("less than 13 GB free on the GPU")
    sent = Sent(numel, num_segments=2)
    sent.encode()
    sent.decode()
    step = sent.values.abs().max() / 100
    assert float((sent.decoded - sent.values).abs().max()) < step
    tail = Sent(1 << 20)
    tail.values.copy_(sent.values[-(1 << 20) :])
    assert not torch.equal(sent.decoded[-(1 << 20) :], torch.zeros_like(tail.values))


class Keeper:
    """A shard on the GPU and the row that is kept of it, and both again on the CPU."""

    def __init__(self, numels: dict[int, int]) -> None:
        segments = [
            Segment(
                bits=bits,
                dtype=DType.FP32,
                padded=numel,
                parameter=bits,
                bucket=128,
                rounding=Rounding.DITHER,
                keeps_epochs=True,
            )
            for bits, numel in numels.items()
        ]
        segments.append(Segment(bits=0, dtype=DType.FP32, padded=99_999, parameter=0))
        layout = Layout(segments, group=2)
        self.table = torch.tensor(layout.table([segment.padded for segment in segments]))
        rows = changes.kept_rows(self.table)
        self.x = torch.randn(layout.num_values)
        self.kept = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
        for row in rows:
            if row.bits:
                row.meta(self.kept).view(torch.float32)[::2] = torch.nan
        self.most_bytes = most_body_bytes(rows)
        self.gpu_kept = self.kept.cuda()

    def encode(self, x: Tensor, kept: Tensor, step: int) -> tuple[Tensor, Tensor]:
        frame = torch.empty(self.most_bytes, dtype=torch.uint8, device=x.device)
        counts, modes = torch.zeros(3, dtype=torch.int64), torch.full((len(self.table),), 2)
        given = (kept, modes, step, 200, 0.25, frame, counts)
        torch.ops.qsdp.encode_changes(x.view(torch.uint8), self.table, 7, *given)
        return frame[: counts[0]], counts

    def step(self, number: int) -> Tensor:
        """Both alike; returns the counts."""
        body, counts = self.encode(self.x, self.kept, number)
        gpu_body, gpu_counts = self.encode(self.x.cuda(), self.gpu_kept, number)
        assert torch.equal(gpu_counts, counts)
        assert torch.equal(gpu_body.cpu(), body)
        torch.ops.qsdp.apply_changes(body, self.table, number, self.kept)
        torch.ops.qsdp.apply_changes(gpu_body, self.table, number, self.gpu_kept)
        assert torch.equal(self.gpu_kept.cpu(), self.kept)
        return counts


def test_changes_of_millions_of_values_are_those_of_cpus() -> None:
    keeper = Keeper({4: 20_000_001, 8: 3_000_000, 2: 77})
    assert keeper.step(0)[2] > 100_000
    for number in range(1, 4):
        keeper.x += torch.randn_like(keeper.x).mul_(0.02)
        assert keeper.step(number)[1] > 100_000


def test_changes_wait_for_their_own_stream_alone() -> None:
    keeper = Keeper({4: 1_000_000})
    own, other = torch.cuda.Stream(), torch.cuda.Stream()
    want, _ = keeper.encode(keeper.x, keeper.kept, 0)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(2_000_000_000)
    with torch.cuda.stream(own):
        torch.cuda._sleep(100_000_000)
        x = keeper.x.cuda()
        body, _ = keeper.encode(x, keeper.gpu_kept, 0)
        torch.ops.qsdp.apply_changes(body, keeper.table, 0, keeper.gpu_kept)
    assert own.query()  # the host has waited
    assert not other.query()
    assert torch.equal(body.cpu(), want)


@pytest.mark.parametrize("said", [b"", b"\4", b"\1\2", b"\1" + b"\3" * 8])
def test_a_frame_that_cannot_be_leaves_the_gpu_in_use(said: bytes) -> None:
    keeper = Keeper({4: 1024})
    body = torch.tensor(list(said), dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=r"^a frame [^:]+: give what encode_changes wrote"):
        torch.ops.qsdp.apply_changes(body, keeper.table, 0, keeper.gpu_kept)
    assert torch.equal(keeper.gpu_kept.cpu(), keeper.kept)
    keeper.step(0)


_STOPS = """
import torch
import qsdp.ops
values = torch.ones(5000, device="cuda")
out = torch.empty(20000, dtype=torch.uint8, device="cuda")
bits = torch.full((625,), {bits}, dtype=torch.uint8, device="cuda")
spans = torch.tensor([[0, 5000, 4, 0, 0, {count}]])
torch.ops.qsdp.compact(values.view(torch.uint8), spans, bits, out, True)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("bits", "count", "told"),
    [(0x0F, 2500, "outside the mask is not zero"), (0xFF, 4999, "does not match its mask")],
)
def test_what_only_the_gpu_sees_ends_its_use(bits: int, count: int, told: str) -> None:
    code = _STOPS.format(bits=bits, count=count)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert done.returncode != 0
    assert told in done.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({0: torch.zeros(64, dtype=torch.int8)}, "the buffer is"),
        ({0: torch.zeros(2, 32, dtype=torch.uint8)}, "the buffer is"),
        ({4: torch.zeros(64)}, "the payload is"),
    ],
)
def test_refusals(change: dict[int, Tensor], told: str) -> None:
    sent = Sent(16)
    arguments = [sent.values.view(torch.uint8), sent.table, 5, sent.header, sent.payload]
    for place, tensor in change.items():
        arguments[place] = tensor.cuda()
    with pytest.raises(ValueError, match=told):
        torch.ops.qsdp.encode(*arguments)
    arguments = [sent.values.cpu().view(torch.uint8), sent.table, 5, sent.header, sent.payload]
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        torch.ops.qsdp.encode(*arguments)
