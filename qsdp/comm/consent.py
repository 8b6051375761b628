"""[Note: Consent] How ranks find out that they do not do the same, before it can harm.

Payloads of different sizes end ranks without a word (gloo aborts the receiver) or hang them (NCCL).
What is fixed is compared when qsdp is installed. What may change with every step is which of a
group's parameters got a gradient: FSDP2's reduce buffer holds only those. So a group's ranks keep
the set that they agreed on last, and its reduce is as large as that set makes it, on every rank:

    first reduce of a group         an all-gather of 8 bytes first: do all have the same set?
    a rank has the agreed set       it reduces; not a byte, not a collective more than without this
    a rank has another set          it sends as many bytes, whose headers say so (`Standing`); the
                                    others see it where they check headers anyway
    all ranks have other sets       they ask again as the first time, and then reduce
    some ranks have other sets      all raise, and name the parameters

So a set that changes on all ranks at once costs one exchange of the old set's size. Over NCCL only
ranks with another set read headers, since it stops the stream: they raise, which ends the others.

A rank that used no parameter of a group does not reduce it, and its next collective meets another
one of its peers. Headers tell, where sizes happen to be equal; else gloo aborts a rank, whose peers
then say which group they were at.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist

from qsdp import compat
from qsdp.codec.payload import HEADER_BYTES, Standing
from qsdp.comm import transport
from qsdp.comm.failures import collective, listed
from qsdp.comm.gather import check_headers
from qsdp.comm.plan import Plan
from qsdp.comm.reduce import Hop

Places = tuple[int, ...]


def compare(mine: object, groups: Sequence[dist.ProcessGroup], what: str) -> dict[int, Any] | None:
    """What each global rank calls ``mine``, or None if that is the same on all.

    Args:
        mine: of plain types, so that what is equal has the same `repr`.
        groups: process groups whose ranks all call this; with two, the rows and columns of a mesh,
            and every rank hears of all of its ranks.
        what: this collective's name, if it fails.

    It takes one all-gather of 8 bytes a group; descriptions are sent only if something differs.
    """
    digest, is_same = _digest(mine), True
    for group in groups:
        own = torch.tensor([digest], device=compat.device_of(group))
        everyone = own.new_empty(group.size())
        with collective(what):
            compat.all_gather(everyone, own, group)
            is_same &= bool((everyone == own).all())
        # What one axis of the mesh saw, the next one must know, or some ranks would go on.
        digest = _digest(everyone.tolist())
    if is_same:
        return None
    found = {dist.get_rank(): mine}
    for group in groups:
        parts: list[dict[int, Any]] = [{} for _ in range(group.size())]
        with collective(what):
            dist.all_gather_object(parts, found, group=group)
        found = {rank: each for part in parts for rank, each in part.items()}
    return dict(sorted(found.items()))


class Consent:
    """The parameters of one group that all ranks reduce: see [Note: Consent]."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._agreed: Places | None = None

    def settle(
        self,
        places: Places,
        group: dist.ProcessGroup,
        hops: Callable[[Places], Sequence[Hop]],
        step: int,
        device: torch.device,
    ) -> None:
        """Make sure that all ranks of ``group`` are about to reduce the parameters at ``places``.

        Args:
            places: of this rank's gradients, among the group's parameters.
            group: the ranks that reduce together.
            hops: the all-to-alls of a reduce of the parameters at the places it is given.
            step: of the keys' clock.
            device: where the gradients lie.

        Raises RuntimeError unless they all have the same, on every rank but over NCCL.
        """
        if places == self._agreed:
            return
        if self._agreed is not None:
            standing = self._announce(hops(self._agreed), step, device)
            if standing == Standing.MIXED:
                self.refuse(places, group, device)
        self._ask(places, group)

    def refuse(self, places: Places, group: dist.ProcessGroup, device: torch.device) -> None:
        """Raise RuntimeError, since some ranks have the agreed set and some have not."""
        assert self._agreed is not None
        if transport.is_seen(group, device):
            self._ask(places, group)
        here = f"rank {dist.get_rank()}"
        raise RuntimeError(self._difference("another rank", self._agreed, here, places))

    def _announce(self, hops: Sequence[Hop], step: int, device: torch.device) -> Standing:
        """Take part in a reduce of the agreed set without having it.

        Returns CHANGED if all ranks did so, else MIXED.
        """
        standing = Standing.CHANGED
        for side, _, group, owned in hops:
            ranks = dist.get_process_group_ranks(group)
            me = group.rank()
            width = len(owned[me])
            senders = [rank for rank in ranks if rank != ranks[me] for _ in range(width)]
            size = side.payload_bytes
            sent = torch.zeros(len(senders), size, dtype=torch.uint8)
            header = torch.tensor(side.header(ranks[me], step, standing))
            sent[:, :HEADER_BYTES] = header.view(torch.uint8)
            # As the others send theirs: a group may have one backend for CPUs and one for GPUs.
            payloads = sent.view(-1).to(device)
            received = torch.empty_like(payloads)
            splits = [width * size if rank != me else 0 for rank in range(group.size())]
            with collective("reduce", self._plan.names, step):
                transport.all_to_all(received, payloads, splits, splits, group).wait()
            standing = check_headers(received, side, senders, step, self._plan, standing)
        return standing

    def _ask(self, places: Places, group: dist.ProcessGroup) -> None:
        plan = self._plan
        found = compare((plan.index, plan.name, places), [group], f"agreement on {plan.name}")
        if found is None:
            self._agreed = places
            return
        first, *_ = found
        rank = next(rank for rank, each in found.items() if each != found[first])
        (index, name, theirs), (first_index, first_name, firsts) = found[rank], found[first]
        if index != first_index:
            raise RuntimeError(
                f"rank {rank} reduces the group of {name} while rank {first} reduces that of "
                f"{first_name}: let every rank use the same layers, in the same order"
            )
        raise RuntimeError(self._difference(f"rank {rank}", theirs, f"rank {first}", firsts))

    def _difference(self, one: str, ones: Places, other: str, others: Places) -> str:
        names = self._plan.names
        if not set(others) - set(ones):
            one, ones, other, others = other, others, one, ones
        missing = [names[i] for i in others if i not in ones]
        return (
            f"{one} has no gradient of {listed(missing)} to reduce, but {other} has: use the same "
            "parameters on every rank, or call set_reduce_scatter_unused_params(True) on the "
            "sharded modules (torch 2.13)"
        )


def _digest(described: object) -> int:
    return int.from_bytes(
        blake2b(repr(described).encode(), digest_size=8).digest(), "little", signed=True
    )
