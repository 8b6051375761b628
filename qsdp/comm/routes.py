"""Which payloads one call of the codec works through: made once, the same in every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Route:
    """The payloads of one call, in order: int64 [payloads] each."""

    owners: Tensor
    """Ranks of the shard group whose slices they are; in a reduce, those that they go to."""
    senders: Tensor
    """In a gather ranks of the shard group, else global ones."""
    buffers: Tensor
    """Rows of the buffers."""
    payloads: Tensor
    """Rows of the payloads."""
    adds: Tensor
    """1 where values are added to what the buffer holds."""


@lru_cache
def gathered(order: tuple[int, ...]) -> Route:
    """What comes of a gather that leaves the payloads of ranks in ``order``."""
    ranks = torch.arange(len(order))
    places = torch.tensor(order).argsort()
    return Route(ranks, ranks, ranks, places, torch.zeros_like(ranks))


@lru_cache
def sent(owners: tuple[int, ...], me: int, global_ranks: tuple[int, ...]) -> Route:
    """What the rank at place ``me`` of ``global_ranks`` sends of its rows.

    Row i goes to the owner i, at the place i % ranks: first the first other rank's, then the next
    one's.
    """
    num = len(global_ranks)
    peers = torch.tensor([place for place in range(num) if place != me])
    rows = (peers[:, None] + num * torch.arange(len(owners) // num)).flatten()
    sender = torch.full_like(rows, global_ranks[me])
    numbers = torch.arange(len(rows))
    return Route(torch.tensor(owners)[rows], sender, rows, numbers, torch.zeros_like(rows))


@lru_cache
def received(mine: tuple[int, ...], me: int, global_ranks: tuple[int, ...]) -> Route:
    """What that rank receives, to be added up: a row for each owner in ``mine`` from each other."""
    peers = torch.tensor([place for place in range(len(global_ranks)) if place != me])
    width = len(mine)
    senders = torch.tensor(global_ranks)[peers].repeat_interleave(width)
    rows = torch.arange(width).repeat(len(peers))
    adds = (peers > 0).long().repeat_interleave(width)
    numbers = torch.arange(len(rows))
    return Route(torch.tensor(mine).repeat(len(peers)), senders, rows, numbers, adds)


@lru_cache
def averaged(owner: int, global_ranks: tuple[int, ...]) -> Route:
    """A payload of ``owner``'s row from each replica, to be added up."""
    places = torch.arange(len(global_ranks))
    senders, first = torch.tensor(global_ranks), torch.zeros_like(places)
    return Route(first + owner, senders, first, places, (places > 0).long())
