"""Which payloads one call of the codec works through: made once, the same in every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Route:
    """A route: the payloads of one call of the codec, in order, int64 [payloads] each."""

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
def gather_route(order: tuple[int, ...]) -> Route:
    """The route of what a gather brings, which leaves the payloads of ranks in ``order``."""
    ranks = torch.arange(len(order))
    places = torch.tensor(order).argsort()
    return Route(ranks, ranks, ranks, places, torch.zeros_like(ranks))


@lru_cache
def sent_route(owners: tuple[int, ...], me: int, global_ranks: tuple[int, ...]) -> Route:
    """The route of what the rank at place ``me`` of ``global_ranks`` sends of its rows.

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
def received_route(mine: tuple[int, ...], me: int, global_ranks: tuple[int, ...]) -> Route:
    """The route of what that rank receives and adds up: a row for each owner in ``mine``.

    There is one from each other rank.
    """
    peers = torch.tensor([place for place in range(len(global_ranks)) if place != me])
    width = len(mine)
    senders = torch.tensor(global_ranks)[peers].repeat_interleave(width)
    rows = torch.arange(width).repeat(len(peers))
    adds = (peers > 0).long().repeat_interleave(width)
    numbers = torch.arange(len(rows))
    return Route(torch.tensor(mine).repeat(len(peers)), senders, rows, numbers, adds)


@lru_cache
def average_route(owner: int, global_ranks: tuple[int, ...]) -> Route:
    """The route of an average: a payload of ``owner``'s row from each replica, added up."""
    places = torch.arange(len(global_ranks))
    senders, first = torch.tensor(global_ranks), torch.zeros_like(places)
    return Route(first + owner, senders, first, places, (places > 0).long())
