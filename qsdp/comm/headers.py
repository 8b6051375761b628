"""What opens a payload, and what the ranks learn from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsdp.codec.payload import HEADER_BYTES, PayloadStatus
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan


class Misheard(RuntimeError):
    """Others have sent what ranks of one run do not: all whom it reaches say the same."""


def check_headers(
    payloads: Tensor | None,
    layout: GroupLayout,
    senders: Sequence[int],
    step: int,
    plan: Plan,
    status: PayloadStatus = PayloadStatus.KEPT,
) -> PayloadStatus:
    """Raise RuntimeError unless the headers of all payloads are as expected.

    ``payloads`` are None where nobody looks at them. That is so for a GPU's over NCCL, for it would
    stop the stream: there the size of the collective is the only check.

    Returns this rank's status ([Note: Consensus]) after what it heard of the senders'.
    """
    if not len(senders) or payloads is None:
        return status
    found = payloads.view(len(senders), -1)[:, :HEADER_BYTES].view(torch.int64)
    expected = layout.expected_headers(senders, step)
    found = found.cpu()
    if status == PayloadStatus.KEPT and torch.equal(found, expected):
        return status
    difference = found ^ expected
    heard = difference[:, 3].tolist()
    difference[:, 3] = torch.tensor([each not in list(PayloadStatus) for each in heard])
    check_none_failed(heard, senders, plan)
    if difference.any():
        row = int(difference.any(1).nonzero()[0])
        raise Misheard(
            f"rank {senders[row]} sent a payload with header {found[row].tolist()} for the group "
            f"of {plan.name}, but {expected[row].tolist()} is expected (version and sender, "
            "step, bytes, plan): run the same model, config and step on every rank."
        )
    return status if set(heard) == {status} else PayloadStatus.MIXED


def check_none_failed(heard: Sequence[int], senders: Sequence[int], plan: Plan) -> None:
    """Raise Misheard if a status that was ``heard`` in a header says that its sender failed."""
    if PayloadStatus.FAILED in heard:
        raise Misheard(mistake_of(senders[heard.index(PayloadStatus.FAILED)], plan))


def mistake_of(rank: int, plan: Plan) -> str:
    """What the others say where ``rank`` has an error of its own."""
    return (
        f"rank {rank} cannot send its part of the group of {plan.name}, for which it has an error "
        "of its own: do the same on every rank."
    )


def only_header(layout: GroupLayout, sender: int, step: int, status: PayloadStatus) -> Tensor:
    """A payload that is a header alone, and says nothing but ``status``."""
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    payload[:HEADER_BYTES] = torch.tensor(layout.header(sender, step, status)).view(torch.uint8)
    return payload
