"""Where the time of the collectives goes: encoding, the wire, decoding."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("encode", "wire", "decode")


class Times:
    """Cumulative times of one handle's phases, in seconds by direction and phase.

    On CPUs a phase is as long as its calls take: of a gather that runs beside the computation, the
    wire is what is still to be waited for. On GPUs it is the time between two events of the stream.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    @contextmanager
    def measure(self, direction: str, phase: str, device: torch.device) -> Iterator[None]:
        """Count what happens inside as ``phase``, one of PHASES, of a gather or reduce."""
        name = f"{direction}_{phase}_s"
        if device.type == "cpu":
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
            return
        first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))
        while self._events and self._events[0][2].query():
            self._count(*self._events.pop(0))

    def snapshot(self) -> dict[str, float]:
        """Seconds since install: ``gather_encode_s``, ``gather_wire_s``, ..., ``reduce_decode_s``.

        On a GPU it waits for what is still under way.
        """
        for name, first, last in self._events:
            last.synchronize()
            self._count(name, first, last)
        self._events.clear()
        names = [f"{direction}_{phase}_s" for direction in ("gather", "reduce") for phase in PHASES]
        return {name: self._seconds[name] for name in names}

    def _count(self, name: str, first: torch.Event, last: torch.Event) -> None:
        self._seconds[name] += first.elapsed_time(last) / 1e3
