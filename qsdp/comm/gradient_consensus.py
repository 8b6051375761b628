"""[Note: Consensus] How ranks find out that they do not do the same, before it can harm.

Payloads of different sizes end ranks without a word (gloo aborts the receiver) or hang them (NCCL).
What is fixed is compared when qsdp is installed. What may change with every step is which of a
group's parameters got a gradient: FSDP2's reduce buffer holds only those. So a group's ranks keep
the set that they agreed on last, and its reduce is as large as that set makes it, on every rank:

    first reduce of a group         an all-gather of 8 bytes first: do all have the same set?
    a rank has the agreed set       it reduces; not a byte, not a collective more than without this
    a rank has another set          it sends as many bytes, whose headers say so; the others see it
                                    where they check headers anyway (``PayloadStatus``)
    all ranks have other sets       they ask again as the first time, and then reduce
    some ranks have other sets      all ask each other, and raise: they name the parameters

So a set that changes on all ranks at once costs one exchange of the old set's size. With replicas
that qsdp averages, the ranks are those of the shard group and of its replicas, and what a rank has
heard in its shard group it tells its replicas in the same way. Over NCCL only ranks with another
set read headers, since it stops the stream: they raise, which ends the others.

Where a reduce may be left under way ([Note: Late] in ``comm/late_reduce.py``) the ranks hear of it
at different times. There all, also those that know at once, go on with every further collective of
the backward pass, gradients of NaN in place of the group's, and ask each other at its end.

A rank that used no parameter of a group does not reduce it, and its next collective meets another
one of its peers. Headers tell, where sizes happen to be equal; else gloo aborts a rank, whose peers
then say which group they were at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from qsdp.codec.payload import PayloadStatus
from qsdp.comm import transport
from qsdp.comm.differing_gradients import GradientsDiffer
from qsdp.comm.group_layout import GroupLayout
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import check_headers, only_header
from qsdp.comm.reduce_scatter import Exchange
from qsdp.common.collective_errors import collective
from qsdp.common.rank_agreement import compare
from qsdp.common.user_errors import names_for_user

Places = tuple[int, ...]


class Consensus:
    """The consensus on the gradients of one group that all ranks reduce: [Note: Consensus].

    Args:
        plan: How the group travels.
        replicas: The ranks that hold the same shards, where qsdp averages over them.
    """

    def __init__(self, plan: Plan, replicas: dist.ProcessGroup | None) -> None:
        self._plan, self._replicas = plan, replicas
        self._agreed: Places | None = None

    def settle(
        self,
        places: Places,
        group: dist.ProcessGroup,
        exchanges: Callable[[Places], Sequence[Exchange]],
        step: int,
        device: torch.device,
        averaged: Callable[[Places], GroupLayout],
    ) -> None:
        """Make sure that all ranks are about to reduce the parameters at ``places``.

        These are the ranks of ``group`` and their replicas.

        Args:
            places: Places of this rank's gradients among the group's parameters.
            group: The ranks that reduce together.
            exchanges: The all-to-alls of a reduce of the parameters at the places it is given.
            step: The step of the keys' clock.
            device: Where the gradients lie.
            averaged: The layout of the average over replicas, of the parameters at the same places.

        Raises:
            RuntimeError: All have changed to different ones; on every rank, except over NCCL.
            GradientsDiffer: Some ranks have the agreed ones: the others hear of it in their reduce.
        """
        if places == self._agreed:
            return
        if self._agreed is not None:
            status = self._announce(exchanges(self._agreed), step, device)
            status = self.tell_replicas(averaged(self._agreed), step, device, status)
            if status != PayloadStatus.CHANGED:
                raise GradientsDiffer
        self._ask(places, group)

    def refuse(self, places: Places, group: dist.ProcessGroup, device: torch.device) -> None:
        """Raise RuntimeError, since some ranks have the agreed set and some have not."""
        assert self._agreed is not None
        if transport.host_can_read(group, device):
            self._ask(places, group)
        here = f"rank {dist.get_rank()}"
        raise RuntimeError(self._difference("another rank", self._agreed, here, places))

    def tell_replicas(
        self, layout: GroupLayout, step: int, device: torch.device, status: PayloadStatus
    ) -> PayloadStatus:
        """Take part in an average over the replicas without having anything to average.

        Returns this rank's status after what it heard.
        """
        if self._replicas is None:
            return status
        ranks = dist.get_process_group_ranks(self._replicas)
        own = only_header(layout, dist.get_rank(), step, status).to(device)
        received = own.new_empty(len(ranks) * own.numel())
        with collective("all-reduce between replicas", self._plan.names, step):
            transport.start_all_gather(received, own, self._replicas).wait()
        return check_headers(received, layout, ranks, step, self._plan, status)

    def _announce(
        self, exchanges: Sequence[Exchange], step: int, device: torch.device
    ) -> PayloadStatus:
        """Take part in a reduce of the agreed set without having it.

        Returns CHANGED if all ranks did so, else MIXED.
        """
        status = PayloadStatus.CHANGED
        for layout, _, group, owned in exchanges:
            ranks = dist.get_process_group_ranks(group)
            me = group.rank()
            width = len(owned[me])
            senders = [rank for rank in ranks if rank != ranks[me] for _ in range(width)]
            size = layout.payload_bytes
            sent = only_header(layout, ranks[me], step, status).repeat(len(senders))
            # As the others send theirs: a group may have one backend for CPUs and one for GPUs.
            payloads = sent.to(device)
            received = torch.empty_like(payloads)
            splits = [width * size if rank != me else 0 for rank in range(group.size())]
            with collective("reduce", self._plan.names, step):
                transport.start_all_to_all(received, payloads, splits, splits, group).wait()
            status = check_headers(received, layout, senders, step, self._plan, status)
        return status

    def _ask(self, places: Places, group: dist.ProcessGroup) -> None:
        plan = self._plan
        groups = [group] if self._replicas is None else [group, self._replicas]
        found = compare("a reduce", (plan.index, plan.name, places), groups)
        if found is None:
            self._agreed = places
            return
        first, *_ = found
        rank = next(rank for rank, each in found.items() if each != found[first])
        (index, name, theirs), (first_index, first_name, firsts) = found[rank], found[first]
        if index != first_index:
            raise RuntimeError(
                f"rank {rank} reduces the group of {name} while rank {first} reduces that of "
                f"{first_name}: let every rank use the same layers, in the same order."
            )
        raise RuntimeError(self._difference(f"rank {rank}", theirs, f"rank {first}", firsts))

    def _difference(self, one: str, ones: Places, other: str, others: Places) -> str:
        names = self._plan.names
        if not set(others) - set(ones):
            one, ones, other, others = other, others, one, ones
        missing = [names[i] for i in others if i not in ones]
        return (
            f"{one} has no gradient of {names_for_user(missing)} to reduce, but {other} has: use "
            "the same parameters on every rank, or call set_reduce_scatter_unused_params(True) on "
            "the sharded modules (torch 2.13)."
        )
