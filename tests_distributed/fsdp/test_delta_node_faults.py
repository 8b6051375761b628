"""Where the ranks of a node keep codes between them, a fault of one rank reaches all the others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import qsdp
from qsdp import ops
from qsdp.comm import transport
from tests_distributed.fsdp.test_delta_faults import POINTS as POINTS_OF_RANKS
from tests_distributed.support.delta import (
    decoded,
    fails_to_apply,
    installed,
    interrupted_at,
    same_on_all_ranks,
    take_sgd_step,
)
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.one_rank import assert_said, say_at_each
from tests_distributed.support.running import Run, selection

RANKS = 4
NODES: dict[str, Any] = {"ranks_per_node": 2, "delta_codes": "node"}
CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 8, "delta_redraw_every": 3, **NODES}

NORM = 64
"""A byte behind the header and the bitmap of a frame: of a norm, which travels raw."""

# --- faults ---------------------------------------------------------------------------------------


@contextmanager
def _cannot_encode(model: Any) -> Iterator[None]:
    with mock.patch.object(ops, "encode_changes", side_effect=RuntimeError("no memory.")):
        yield


@contextmanager
def _sends_what_cannot_be(model: Any) -> Iterator[None]:
    """The frame's first count is more than a bucket can have."""
    encode = ops.encode_changes

    def encode_odd(*args: Any) -> None:
        encode(*args)
        body, counts = args[-2:]
        body[: int(counts[0])] = 253

    with mock.patch.object(ops, "encode_changes", encode_odd):
        yield


@contextmanager
def _sees_another_bit(model: Any) -> Iterator[None]:
    """The first frame that arrives is another one here: a value of a norm."""
    wait, is_damaged = transport.Arrival.wait, False

    def damaged_on_the_way(arrival: Any) -> torch.Tensor | None:
        nonlocal is_damaged
        seen = wait(arrival)
        # Not what ranks agree on before they send frames.
        if seen is not None and seen.dtype == torch.uint8 and not is_damaged:
            seen.view(-1)[NORM] ^= 1
            is_damaged = True
        return seen

    with mock.patch.object(transport.Arrival, "wait", damaged_on_the_way):
        yield
    assert is_damaged


def _cannot_apply(error: type[BaseException]) -> Callable[[Any], Any]:
    return lambda model: fails_to_apply(model, error)


SENDS = r"rank {odd} cannot send its part of the group of [^\n]+ of its own: do the same on .*"
CHANGES = r"rank {odd} sent changes for the group of [^\n]+ that cannot be \([^\n]+\): run the .*"
FAULTS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "cannot encode": (_cannot_encode, r"no memory\.", SENDS),
    "sends what cannot be": (_sends_what_cannot_be, CHANGES, CHANGES),
    "cannot apply": (_cannot_apply(RuntimeError), "an interruption", SENDS),
    "is interrupted": (_cannot_apply(KeyboardInterrupt), "an interruption", SENDS),
    "sees another bit": (_sees_another_bit, "nothing", "nothing"),
    "fails otherwise": (_cannot_apply(LookupError), "an interruption", SENDS),
}
"""What happens to one rank, what it says, and what others say."""


def _faults(names: tuple[str, ...], odd: int) -> dict[str, dict[str, Any]]:
    """What this rank says in the step of each fault and in the next one, and how it goes on."""
    found = {}
    for name in names:
        model, handle = installed(6, CONFIG, num_layers=1)
        take_sgd_step(model, 0, 0.1)
        said = ["nothing", "nothing"]
        there = FAULTS[name][0](model) if dist.get_rank() == odd else nullcontext()
        with there:
            try:
                model(*make_batch(model, 1))
            except (RuntimeError, LookupError, KeyboardInterrupt) as error:
                said[0] = str(error.args[0])
        if name == "is interrupted":  # of which torch's modules tell no hook
            handle.abandon_step()
        try:
            take_sgd_step(model, 2, 0.1)
        except RuntimeError as error:
            said[1] = str(error)
            model.zero_grad()
            handle.abandon_step()
        present = torch.ones(())
        dist.all_reduce(present)  # no collective is half done
        assert present == RANKS
        losses = [take_sgd_step(model, step, 0.1) for step in range(3, 5)]
        same = same_on_all_ranks(decoded(model))
        handle.remove()
        found[name] = {"said": said, "same": same, "losses": losses}
    return found


CHEAP = tuple(name for name in FAULTS if name not in ("cannot apply", "fails otherwise"))


@selection(("names", "odd"), [(CHEAP, 3)], [CHEAP, tuple(FAULTS)], range(RANKS))
def test_a_fault_of_one_rank_is_one_sentence_on_all_and_training_goes_on_alike(
    run: Run, names: tuple[str, ...], odd: int
) -> None:
    everyone = run(RANKS, _faults, names, odd)
    for name in names:
        _, own, others = FAULTS[name]
        is_in_a_frame = name in ("cannot encode", "sends what cannot be")
        for rank, found in enumerate(each[name] for each in everyone):
            first, second = found["said"]
            where = f"{name}, rank {rank}: {first} {second}"
            hears_now = is_in_a_frame or rank // 2 == odd // 2
            expected = own if rank == odd else others if hears_now else "nothing"
            assert re.fullmatch(expected.format(odd=odd), first), where
            # What one rank alone could not apply the other nodes hear of where all meet.
            lost = r"rank \d is at a forward pass with the digest of kept codes .* on every rank\."
            assert re.fullmatch("nothing" if is_in_a_frame else lost, second), where
            assert found["same"], where
            assert all(map(math.isfinite, found["losses"])), where
        said = [each[name]["said"] for each in everyone]
        assert (
            len({first for rank, (first, _) in enumerate(said) if rank != odd} - {"nothing"}) <= 1
        )
        assert len({second for _, second in said}) == 1


def _interrupted_everywhere() -> tuple[list[str], list[bool]]:
    """Every rank is interrupted while it applies frames of one group, two of them at another."""
    model, handle = installed(6, {**CONFIG, "delta_redraw_every": 1000}, num_layers=1)
    return interrupted_at(model, handle, dist.get_rank() // 2)


def test_ranks_that_are_all_interrupted_do_not_part_in_silence(run: Run) -> None:
    everyone = run(RANKS, _interrupted_everywhere)
    for said, same in everyone:
        assert said == everyone[0][0]
        assert len(said) == 1
        assert re.fullmatch(
            r"rank \d is at a forward pass with the digest of kept codes .*\.", said[0]
        )
        assert same == [True, True]


# --- ranks that differ ----------------------------------------------------------------------------

POINTS = {
    name: replace(point, config=CONFIG | {"gather": "delta"})
    for name, point in POINTS_OF_RANKS.items()
}


def _said(odd: int) -> dict[str, str]:
    return say_at_each(POINTS, odd)


@selection("odd", [(1,)], range(RANKS))
def test_when_one_rank_differs_all_raise_one_sentence(run: Run, odd: int) -> None:
    assert_said(POINTS, run(RANKS, _said, odd), odd)


# --- refusals -------------------------------------------------------------------------------------


def _refusals() -> dict[str, str]:
    """What ``install`` says where there is nothing to keep between several ranks of a node."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    native, between = ({"mesh": mesh}, None), ({"mesh": mesh["shard"]}, mesh["replicate"])
    ways: dict[str, tuple[int | None, Any]] = {
        "one node, by default": (None, ({}, None)),
        "one node": (4, ({}, None)),
        "a rank a node": (1, ({}, None)),
        "uneven nodes": (3, ({}, None)),
        "native replicas of a node": (2, native),
        "replicas of a node": (2, between),
    }
    said = {}
    for name, (ranks_per_node, (options, replicas)) in ways.items():
        config = qsdp.QSDPConfig(gather="delta", delta_codes="node", ranks_per_node=ranks_per_node)
        with pytest.raises(ValueError) as raised:
            qsdp.install(shard(make_model(), **options), config, replicate_mesh=replicas)
        said[name] = str(raised.value)
    own = NODES if dist.get_rank() != 2 else {"ranks_per_node": 2}
    with pytest.raises(RuntimeError) as differs:
        qsdp.install(shard(make_model()), qsdp.QSDPConfig(gather="delta", **own))
    return said | {"one rank's own": str(differs.value)}


def test_where_ranks_do_not_fill_nodes_all_are_told_so(run: Run) -> None:
    for rank, said in enumerate(run(RANKS, _refusals)):
        differs = said.pop("one rank's own")
        assert re.fullmatch(
            r"rank 2 installs qsdp with delta_codes None but rank 0 with 'node': give every .*\.",
            differs,
        ), differs
        for name, sentence in said.items():
            ranks = [0, 1, 2, 3] if "replicas" not in name else [[0, 1], [2, 3]][rank // 2]
            assert sentence == (
                f"delta_codes is 'node', but the shard group's ranks {ranks} do not fill several "
                "nodes of several ranks each: set ranks_per_node so that they do, or leave "
                "delta_codes out."
            ), name
