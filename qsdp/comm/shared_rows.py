"""Which kept rows are on this rank, and how it has those of the others: [Note: Kept].

By rank, every rank has all rows. By node, a rank has those of the owners of its own place in their
nodes: the ranks of a node have all rows between them, and gather them from each other whenever they
decode them. Frames then go between ranks of one place, from node to node. What each rank of a node
learns from its frames it tells the others of the node, so that all know the same of a gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from qsdp.comm.buffers import as_bytes
from qsdp.comm.group_plan import Plan
from qsdp.comm.headers import Misheard, mistake_of
from qsdp.comm.staged_gather import StagedGather
from qsdp.comm.topology import gathered_ranks
from qsdp.comm.wire_state import Wire
from qsdp.common.collective_errors import CollectiveError
from qsdp.common.splitmix64 import GOLDEN_GAMMA, MASK, finalize


class News(NamedTuple):
    """What ranks have said in the frames of one gather."""

    digest: int
    """That of all frames so far: 64 bits."""
    longest: int
    """Bytes of the longest frame."""
    has_changes: bool
    """Whether any of them says more than that nothing has changed."""
    changed: int
    """Codes that have changed, on grids that have not."""
    drawn: int
    """Buckets that were drawn again."""


_SENTENCE_BYTES = 1024


class ToldMistake(RuntimeError):
    """Another rank of this rank's node could not take what frames say."""


class SharedRows:
    """Where the kept rows of one group are.

    Args:
        plan: How the group travels.
        wire: What the group shares with the others.
    """

    def __init__(self, plan: Plan, wire: Wire) -> None:
        self._plan, self._wire = plan, wire
        is_by_node = wire.config.delta_codes == "node" and len(plan.stages) > 1
        self._node = plan.stages[0] if is_by_node else None
        self.stages = plan.stages[1:] if is_by_node else plan.stages
        """Those that frames go over."""
        self.owners = self._owners(0 if self._node is None else self._node.group.rank())
        """Whose rows are on this rank: ranks of the shard group, in the order of the rows."""
        self.own = self.owners.index(plan.rank)
        """The place of this rank's own row."""
        self.order = gathered_ranks(self.stages)
        """The places of the rows in the order in which frames arrive."""

    def _owners(self, place: int) -> tuple[int, ...]:
        """Whose rows the rank at ``place`` of a node has."""
        ranks_per_node = 1 if self._node is None else self._node.size
        return tuple(range(place, self._plan.world_size, ranks_per_node))

    @property
    def is_by_node(self) -> bool:
        """Whether the ranks of a node gather rows from each other to decode them."""
        return self._node is not None

    def tell(self, take: Callable[[], News], device: torch.device) -> News:
        """What all frames say, where ``take`` takes those that come to this rank.

        ``device``: that of the rows.

        Where ``take`` raises on any rank of a node, an interruption too, all raise: that one what
        it has raised, the others ToldMistake: of a frame all of them say the same.
        """
        if self._node is None:
            return take()
        mistake: BaseException | None = None
        words = [0] * (1 + len(News._fields))
        try:
            news = take()
            words = [1, signed(news.digest), *map(int, news[1:])]
        except CollectiveError:
            raise
        except BaseException as error:  # whatever it is, the others of the node wait to hear of it
            mistake = error
        try:
            found = self._exchange(torch.tensor(words, device=device)).tolist()
            told = self._told([bool(went_well) for went_well, *_ in found], mistake, device)
        except CollectiveError:
            if mistake is None:
                raise
        try:
            if mistake is not None:
                raise mistake
        finally:  # an error that its own traceback holds would keep the process group
            del mistake
        if told is not None:
            raise ToldMistake(told)
        _, digests, longest, has_changes, changed, drawn = zip(*found, strict=True)
        digest = 0
        for each in digests:
            digest = added(digest, each)
        return News(digest, max(longest), any(has_changes), sum(changed), sum(drawn))

    def _told(
        self, went_well: Sequence[bool], mistake: BaseException | None, device: torch.device
    ) -> str | None:
        """The sentence of the first rank of the node that it did not go well for, if there is one.

        ``mistake`` is this rank's.
        """
        if all(went_well):
            return None
        is_heard = isinstance(mistake, Misheard)
        sentence = str(mistake) if is_heard else mistake_of(self._plan.rank, self._plan)
        said = sentence.encode()[:_SENTENCE_BYTES].ljust(_SENTENCE_BYTES, b"\0")
        everyones = self._exchange(torch.tensor([*said], dtype=torch.uint8, device=device))
        told = bytes(everyones[went_well.index(False)].tolist())
        return told.decode(errors="replace").rstrip("\0")

    def _exchange(self, own: Tensor) -> Tensor:
        """What each rank of the node has for its ``own``, [ranks, values]."""
        assert self._node is not None
        everyones = own.new_empty(self._node.size, own.numel())
        self._gather(as_bytes(everyones.view(-1)), as_bytes(own))
        return everyones

    @contextmanager
    def all_rows(self, rows: Tensor) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The rows of all ranks, uint8 [ranks, row bytes], and whose they are.

        They are valid inside. ``rows`` are this rank's, [owners, row bytes].
        """
        if self._node is None:
            yield rows, self.owners
            return
        size = self._node.size
        room = self._wire.buffers.acquire(size * rows.numel(), rows.device)
        self._gather(room, rows.view(-1))
        order = tuple(rank for place in range(size) for rank in self._owners(place))
        yield room.view(-1, rows.shape[1]), order
        self._wire.buffers.release(room)

    def _gather(self, output: Tensor, input: Tensor) -> None:
        """All-gather bytes inside the node."""
        assert self._node is not None
        gather = StagedGather(self._plan, [self._node], output, self._wire)
        gather.own.copy_(input)
        gather.start()
        gather.wait()


def added(digest: int, word: int) -> int:
    """The ``digest`` of words, 64 bits, with one more."""
    return finalize((digest ^ word & MASK) + GOLDEN_GAMMA & MASK)


def signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (word >> 63 << 64)
