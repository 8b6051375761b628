"""What a gather brings is waited for wherever it is decoded."""

from __future__ import annotations

from unittest import mock

import torch

import qsdp
from qsdp.comm import all_gather as gathers
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run


class Mark:
    """Stands for a GPU's event behind what a gather brings."""

    num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1


def _waits(gather: str) -> list[int]:
    """How often each gather's payloads were waited for in a step."""
    model = shard(make_model(1, frozen=True), nested=False)
    qsdp.install(model, qsdp.QSDPConfig(gather=gather))
    marks: list[Mark] = []

    def mark(_: torch.device) -> Mark:
        marks.append(Mark())
        return marks[-1]

    with mock.patch.object(gathers, "written_on_this_stream", mark):
        torch.autograd.backward(model(*make_batch(model, 0)))
    return [mark.num_waits for mark in marks]


def test_payloads_are_waited_for_wherever_they_are_decoded(run: Run) -> None:
    # The root and two blocks, each gathered for either pass.
    assert run(2, _waits, "twice") == [[1] * 6] * 2
    # Each decoded twice; what is frozen of the first block travels by itself.
    assert run(2, _waits, "once") == [[2] * 4] * 2
