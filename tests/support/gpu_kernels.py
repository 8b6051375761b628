"""The CUDA kernels as two more kernels of the codec's tests, which give and take CPU tensors.

"cuda" sends every tensor to the GPU, at an address as odd as its own, and back. "emulated" runs the
bodies of the CUDA kernels on the host; tests/ops/test_cuda_emulation.py builds it under sanitizers
and names it in QSDP_EMULATED_CUDA.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qsdp.ops import native

EMULATION = os.environ.get("QSDP_EMULATED_CUDA")
CUDA, EMULATED = "cuda", "emulated"
NO_GPU = "no GPU, or qsdp was built without CUDA kernels"
CANARY = 0x5A
_MARGIN = 256

PARAMS = [pytest.param(CUDA, marks=pytest.mark.gpu)]
"""For ``pytest.fixture(params=...)`` beside the names of ``native.available``."""
if EMULATION is not None:
    PARAMS.append(pytest.param(EMULATED))


@contextmanager
def serving(name: str) -> Iterator[None]:
    """Within it ``name`` serves CPU tensors: one of ``native.available``, "cuda" or "emulated"."""
    before = native.capability()
    override: torch.library.Library | None = None
    if name not in (CUDA, EMULATED):
        native.use(name)
    else:
        if name == CUDA and not native.has_cuda_kernels():
            pytest.skip(NO_GPU)
        kernels = _on_gpu() if name == CUDA else _emulated()
        override = torch.library.Library("qsdp", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden: it is meant
            for op, kernel in kernels.items():
                override.impl(op, kernel, "CPU")
    try:
        yield
    finally:
        override = None  # which ends it
        native.use(before)


def to_gpu(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy on the GPU at an address that is as odd, inside canaries; and the whole."""
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    num_bytes = max(span, 0) * tensor.itemsize
    whole = torch.full((num_bytes + 2 * _MARGIN,), CANARY, dtype=torch.uint8, device="cuda")
    start = _MARGIN // 2 + tensor.data_ptr() % 64
    flat = whole[start : start + num_bytes].view(tensor.dtype)
    own = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())
    own.copy_(tensor)
    return own, whole


def assert_canaries(inner: Tensor, whole: Tensor) -> None:
    """Nothing outside was written."""
    start = inner.storage_offset() * inner.itemsize
    end = start + inner.numel() * inner.itemsize
    assert inner.is_contiguous()
    assert (whole[:start] == CANARY).all()
    assert (whole[end:] == CANARY).all()


def _on_gpu() -> dict[str, Callable[..., None]]:
    def run(op: str, out: int, stays: tuple[int, ...]) -> Callable[..., None]:
        def kernel(*arguments: Any) -> None:
            sent = {
                place: to_gpu(argument)
                for place, argument in enumerate(arguments)
                if isinstance(argument, Tensor) and place not in stays
            }
            given = [sent[i][0] if i in sent else own for i, own in enumerate(arguments)]
            getattr(torch.ops.qsdp, op)(*given)
            arguments[out].copy_(sent[out][0])
            for inner, whole in sent.values():
                assert_canaries(inner, whole)

        return kernel

    return {
        "encode": run("encode", out=4, stays=(1, 5)),
        "decode": run("decode", out=3, stays=(1, 5)),
        "encode_all": run("encode_all", out=4, stays=(1, 2, 5)),
        "decode_all": run("decode_all", out=3, stays=(1, 2, 4)),
        "encode_changes": run("encode_changes", out=8, stays=(1, 4, 9)),
        "apply_changes": run("apply_changes", out=3, stays=(1,)),
        "compact": run("compact", out=3, stays=(1,)),
        "expand": run("expand", out=3, stays=(1,)),
        "count_digits": run("count_digits", out=4, stays=()),
        "mark_above": run("mark_above", out=2, stays=()),
        "rotate": run("rotate", out=0, stays=(1,)),
    }


def _emulated() -> dict[str, Callable[..., None]]:
    assert EMULATION is not None
    library = ctypes.CDLL(EMULATION)

    def address(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    def encode(
        buffer: Tensor,
        table: Tensor,
        key: int,
        header: list[int],
        payload: Tensor,
        levels: Tensor | None = None,
    ) -> None:
        library.emulate_encode(
            address(buffer),
            address(rows := table.contiguous()),
            ctypes.c_int64(len(rows)),
            ctypes.c_uint64(key % (1 << 64)),
            (ctypes.c_int64 * 4)(*header),
            address(payload),
            ctypes.c_int64(payload.numel()),
            address(levels),
        )

    def decode(
        payload: Tensor,
        table: Tensor,
        key: int,
        buffer: Tensor,
        add: bool = False,
        levels: Tensor | None = None,
    ) -> None:
        library.emulate_decode(
            address(payload),
            address(rows := table.contiguous()),
            ctypes.c_int64(len(rows)),
            ctypes.c_uint64(key % (1 << 64)),
            address(buffer),
            ctypes.c_bool(add),
            address(levels),
        )

    def encode_changes(
        buffer: Tensor,
        table: Tensor,
        key: int,
        kept: Tensor,
        modes: Tensor,
        step: int,
        redraw_every: int,
        room: float,
        frame: Tensor,
        counts: Tensor,
    ) -> None:
        library.emulate_encode_changes(
            address(buffer),
            address(rows := table.contiguous()),
            ctypes.c_int64(len(rows)),
            ctypes.c_uint64(key % (1 << 64)),
            address(kept),
            address(modes),
            ctypes.c_int64(step),
            ctypes.c_int64(redraw_every),
            ctypes.c_double(room),
            address(frame),
            address(counts),
        )

    def apply_changes(frame: Tensor, table: Tensor, step: int, kept: Tensor) -> None:
        library.emulate_apply_changes.restype = ctypes.c_char_p
        told = library.emulate_apply_changes(
            address(frame),
            ctypes.c_int64(frame.numel()),
            address(rows := table.contiguous()),
            ctypes.c_int64(len(rows)),
            ctypes.c_int64(step),
            address(kept),
        )
        if told is not None:
            raise ValueError(told.decode())

    def compact(dense: Tensor, spans: Tensor, bitmap: Tensor, out: Tensor, strict: bool) -> None:
        library.emulate_compact(
            address(dense),
            address(spans),
            ctypes.c_int64(len(spans)),
            address(bitmap),
            address(out),
            ctypes.c_bool(strict),
        )

    def expand(compact: Tensor, spans: Tensor, bitmap: Tensor, out: Tensor) -> None:
        library.emulate_expand(
            address(compact),
            address(spans),
            ctypes.c_int64(len(spans)),
            address(bitmap),
            address(out),
        )

    def rotate(buffer: Tensor, stretches: Tensor) -> None:
        library.emulate_rotate(address(buffer), address(stretches), ctypes.c_int64(len(stretches)))

    return {
        "encode": encode,
        "decode": decode,
        "encode_changes": encode_changes,
        "apply_changes": apply_changes,
        "compact": compact,
        "expand": expand,
        "rotate": rotate,
    }
