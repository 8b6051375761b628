"""One gather or reduce of one rank among many, in one process and without a process group.

Whatever many_ranks.py measures of qsdp/comm is called here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from qsdp import QSDPConfig, ops
from qsdp.codec.random_numbers import KeyDirection, KeyStage, RandomKey
from qsdp.comm import transport
from qsdp.comm.all_gather import PayloadGather, decode_gathered
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Parameter, Plan
from qsdp.comm.late_reduce import exhaust
from qsdp.comm.nodes import Nodes
from qsdp.comm.pruned_slices import SliceMasks
from qsdp.comm.reduce_scatter import reduce, reduce_exchanges
from qsdp.comm.traffic import Traffic
from qsdp.comm.wire_state import Wire
from qsdp.common import bitmask
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import Block

ME = 1  # this rank
RANKS_PER_NODE = 8
CPU = torch.device("cpu")


class Ranks:
    """What plans and collectives ask of a process group."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def size(self) -> int:
        return self._num_ranks

    def rank(self) -> int:
        return ME


class Network:
    """Stands in for the transport: what the others have sent is there at once."""

    def __init__(self) -> None:
        self.payloads = torch.empty(0, dtype=torch.uint8)
        """uint8 [ranks, payload bytes], in the order of ranks; a reduce's have none of this one."""
        self.seconds = 0.0
        """Seconds that the stand-in has taken."""

    def start_all_gather(self, output: Tensor, input: Tensor, group: Any, **_: Any) -> Arrived:
        started = time.thread_time()
        rows = output.view_as(self.payloads)
        assert input.data_ptr() == rows[ME].data_ptr()
        for others in (slice(ME), slice(ME + 1, None)):
            rows[others] = self.payloads[others]
        self.seconds += time.thread_time() - started
        return Arrived(output)

    def start_all_to_all(self, output: Tensor, *_: Any) -> Arrived:
        started = time.thread_time()
        output.view_as(self.payloads).copy_(self.payloads)
        self.seconds += time.thread_time() - started
        return Arrived(output)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, collectives go over it, and no process group is needed."""
        with ExitStack() as stack:
            for name in ("start_all_gather", "start_all_to_all"):
                stack.enter_context(mock.patch.object(transport, name, getattr(self, name)))
            stack.enter_context(mock.patch.object(dist, "get_rank", return_value=ME))
            stack.enter_context(
                mock.patch.object(dist, "get_process_group_ranks", lambda g: [*range(g.size())])
            )
            yield


@dataclass(frozen=True)
class Arrived:
    """What a stand-in returns for a collective under way."""

    output: Tensor

    def wait(self) -> Tensor:
        return self.output


class Collective:
    """What ``Gather`` and ``Reduce`` share: the group, at 8 bits, and what all ranks have of it.

    ``output`` is what ``once`` fills, and is to be equal to ``expected``. ``slices``, fp32 [ranks,
    values], stand in the slices of all ranks' flat buffers. ``travels``, bool [ranks, values], says
    which of these are coded: all, or those that are not pruned.

    Args:
        num_ranks: How many there are in all, at least 2.
        width: The width of the GPT block whose parameters the group has.
        network: Stands in for the transport.
        is_pruned: Only half of the values of each weight travel, both ways.
    """

    def __init__(self, num_ranks: int, width: int, network: Network, *, is_pruned: bool) -> None:
        self.group = cast(dist.ProcessGroup, Ranks(num_ranks))
        nodes = dict.fromkeys(range(num_ranks), min(RANKS_PER_NODE, num_ranks))
        self.network, self.wire = network, Wire(QSDPConfig(), Traffic(Nodes(nodes)))
        self._parameters = block(width, self.wire.config)
        padded = [p.padded_numel(num_ranks) for p in self._parameters]
        masks: dict[int, Tensor] = {}
        travels, is_valid = [], []
        for place, p in enumerate(self._parameters):
            numels = torch.tensor([p.shard_numel(rank, num_ranks) for rank in range(num_ranks)])
            is_valid.append(torch.arange(padded[place]) < numels[:, None])
            travels.append(torch.ones_like(is_valid[-1]))
            if is_pruned and len(p.shape) > 1:
                travels[-1] = masks[place] = is_valid[-1] & (torch.rand(travels[-1].shape) < 0.5)
        self._support = support_of(masks)
        self.travels = torch.cat(travels, dim=1)
        is_kept = torch.cat(is_valid, dim=1) & self.travels
        self.slices = torch.where(is_kept, torch.rand(is_kept.shape) * 2 - 1, 0.0)
        self.forget()

    def forget(self) -> None:
        """Let the next use make everything anew that is the same for all steps."""
        self.plan = Plan(self._parameters, 0, self.group, self.wire.config)
        self.plan.set_support(self._support)

    def code(
        self, layout: GroupLayout, sender: int, owner: int, direction: KeyDirection, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The payload of ``values``, ``owner``'s slice, and what is decoded of it, fp32 [values].

        Both come from single calls of the operators.
        """
        clock, receiver = self.wire.clock, owner if direction == KeyDirection.REDUCE else 0
        key = RandomKey(
            clock.seed, clock.step, direction, KeyStage.FLAT, 0, sender, receiver
        ).fold()
        table, travels = layout.table(owner), self.travels[owner]
        payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
        header = layout.header(sender, clock.step)
        ops.encode(values[travels].view(torch.uint8), table, key, header, payload)
        coded, decoded = torch.zeros(int(travels.sum())), torch.zeros_like(values)
        ops.decode(payload, table, key, coded.view(torch.uint8))
        decoded[travels] = coded
        return payload, decoded


class Gather(Collective):
    """A gather of all weights."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.input = self.slices[ME].clone()
        self.output = torch.empty(self.slices.numel())
        layout = self.plan.gather(self.plan.places)
        coded = [
            self.code(layout, rank, rank, KeyDirection.GATHER, values)
            for rank, values in enumerate(self.slices)
        ]
        self.payloads = torch.stack([payload for payload, _ in coded])
        self.expected = torch.cat([decoded for _, decoded in coded])

    def once(self) -> None:
        self.network.payloads = self.payloads
        plan, wire = self.plan, self.wire
        layout = plan.gather(plan.places, wire.least_bits)
        buffer = wire.buffers.acquire(plan.world_size * layout.payload_bytes, CPU)
        decode_gathered(
            plan, PayloadGather(plan, layout, self.input, wire, buffer).finish(), self.output, wire
        )
        wire.buffers.release(buffer)


class Reduce(Collective):
    """A reduce of all gradients."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.input = self.slices.flatten()
        self.output = torch.empty(self.slices.shape[1])
        layout = self.plan.reduce(self.plan.places, torch.float32)
        self.expected, payloads = torch.zeros_like(self.output), []
        for rank in range(self.group.size()):
            if rank == ME:
                self.expected += self.slices[ME]
                continue
            values = torch.rand_like(self.output) * 2 - 1
            payload, decoded = self.code(layout, rank, ME, KeyDirection.REDUCE, values)
            self.expected += decoded
            payloads.append(payload)
        self.payloads = torch.stack(payloads)

    def once(self) -> None:
        self.network.payloads = self.payloads
        plan, wire = self.plan, self.wire
        wire.clock.rewind()  # the others have keys of a first reduce
        exchanges = reduce_exchanges(plan, plan.places, torch.float32, self.group, wire)
        exhaust(reduce(plan, exchanges, self.output, self.input, wire, 0, is_late=False))


def block(width: int, config: QSDPConfig) -> list[Parameter]:
    """The parameters of a GPT block, as they are planned."""
    with torch.device("meta"):
        module = Block(GPTConfig(vocab_size=1, num_layers=1, num_heads=1, width=width, context=1))
    made = []
    for index, (name, parameter) in enumerate(module.named_parameters()):
        bits = config.bits_of(name, False) if parameter.dim() > 1 else (32, 32)
        made.append(
            Parameter(
                name=name,
                index=index,
                shape=parameter.shape,
                dtype=torch.float32,
                shard_dim=0,
                weight_bits=bits[0],
                grad_bits=bits[1],
                keeps_bits=False,
                why="",
            )
        )
    return made


def support_of(masks: dict[int, Tensor]) -> dict[int, SliceMasks]:
    """What ranks would have told each other of ``masks``, bool [ranks, values], by place."""
    if not masks:
        return {}
    packed = []
    for mask in masks.values():
        whole_bytes = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
        packed.append(bitmask.pack(whole_bytes).view(len(mask), -1))
    bits = torch.cat(packed, dim=1)
    starts = accumulate([0, *(part.shape[1] for part in packed[:-1])])
    return {
        place: SliceMasks(bits, start, mask.sum(1).tolist())
        for (place, mask), start in zip(masks.items(), starts, strict=True)
    }
