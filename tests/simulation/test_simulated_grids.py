"""Grids that the simulated ranks keep: when they are drawn anew, and that codes have no history."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsdp import ops
from qsdp.codec.payload import HEADER_BYTES, Layout, Segment
from qsdp.codec.random_numbers import KeyDirection, KeyStage, RandomKey
from qsdp.codec.segment_table import SegmentRow
from qsdp.common.dtypes import CODEC_DTYPES, DType
from qsdp.ops.reference.changes import FROZEN, STILL, TRAINED
from qsdp.simulation.simulated_grids import SimulatedGrids
from tests.support.simulated import (
    Net,
    Resting,
    assert_same,
    batches,
    epochs,
    error,
    grids,
    rate,
    rest,
    run,
    simulation,
    train_plainly,
)

DELTA: dict[str, Any] = {"weight_bits": 4, "grad_bits": 8, "gather": "delta", "bucket_size": 8}


class Kernels:
    """What ``encode_changes`` and ``apply_changes`` keep of one shard, and decode."""

    def __init__(self, segment: Segment, parameter_group: int) -> None:
        layout = Layout([segment], parameter_group)
        self.table = torch.tensor(layout.table([segment.padded]))
        self.row = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
        num_buckets = -(-segment.padded // segment.bucket)
        words = self.row[HEADER_BYTES : HEADER_BYTES + 12 * num_buckets].view(num_buckets * 3, 4)
        self.low, self.scale = words[: 2 * num_buckets].view(torch.float32).view(-1, 2).unbind(1)
        self.epoch = words[2 * num_buckets :].view(torch.int32).view(-1)
        self.low.fill_(torch.nan)
        self.frame = torch.empty(16 * num_buckets + layout.payload_bytes, dtype=torch.uint8)

    def gather(
        self, values: Tensor, key: int, mode: int, step: int, every: int, room: float
    ) -> Tensor:
        given, self.counts = values.view(torch.uint8), torch.zeros(3, dtype=torch.int64)
        counts = self.counts
        modes = torch.tensor([mode])
        ops.encode_changes(
            given, self.table, key, self.row, modes, step, every, room, self.frame, counts
        )
        ops.apply_changes(self.frame[: counts[0]], self.table, step, self.row)
        decoded = torch.empty_like(values)
        ops.decode(self.row, self.table, key, decoded.view(torch.uint8))
        return decoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "rounding"), [(2, 1), (4, 1), (4, 3), (8, 1)])
@pytest.mark.parametrize("room", [0.25, 1e-9])
def test_grids_are_those_of_the_kernels_whatever_becomes_of_the_values(
    dtype: torch.dtype, bits: int, rounding: int, room: float
) -> None:
    num, every = 8 * random.randrange(20, 30) + random.randrange(8), 5
    segment = Segment(
        bits=bits,
        dtype=CODEC_DTYPES[dtype],
        padded=num,
        parameter=random.randrange(1 << 20),
        bucket=random.choice((8, 24)),
        rounding=rounding,
        keeps_epochs=True,
    )
    group, key = random.randrange(9), random.randrange(1 << 60)
    kernels, simulated = Kernels(segment, group), SimulatedGrids(room, every)
    simulated.fit(group, ())
    row = SegmentRow(Layout([segment], group).table([num])[0])
    exact, is_trained = torch.randn(num) * 10.0 ** torch.randint(-6, 6, (num,)), True
    exact[40:80] *= 1e30
    for step in sorted(random.sample(range(60), 20)):
        is_same = not is_trained
        if random.random() < 0.3:
            is_trained = not is_trained
        is_same &= not is_trained
        if not is_same or random.random() < 0.3:
            exact += 0.01 * torch.randn(num) * exact.abs()
            for odd in (0.0, torch.nan, -torch.inf, 3e38, 1e-42, 1.0):
                where = torch.rand(num) < 0.01
                exact[where] = odd
            exact[100:130] = random.choice((0.0, 0.5))
            is_same = False
        shard = nn.Parameter(exact.to(dtype), is_trained)
        values = shard.detach()
        mode = TRAINED if is_trained else STILL if is_same else FROZEN
        expected = kernels.gather(values, key, mode, step, every, room)
        found = simulated.gather(group, ("shard", 0), values, row, key, step, shard)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), step
        ((_, num_bytes),) = simulated.frames._said.pop(group)[0]
        assert 1 + num_bytes == kernels.counts[0], step  # with a byte of bitmap
        kept, _ = simulated._kept[group].shards["shard", 0]
        torch.testing.assert_close(
            kept, (kernels.low, kernels.scale, kernels.epoch), rtol=0, atol=0, equal_nan=True
        )


def test_numbers_are_drawn_by_seed_epoch_and_sender() -> None:
    config = {**DELTA, "seed": random.randrange(1 << 60)}
    simulated = simulation(config, Matrix(), groups=[], optimizer=rate(0.0))
    segment = Segment(
        bits=4, dtype=DType.FP32, padded=1600, parameter=0, bucket=8, rounding=1, keeps_epochs=True
    )
    kernels = [Kernels(segment, 0) for _ in range(4)]
    decoded = []
    for step in range(3):
        decoded.append(simulated.weights()["weight"])
        for rank, each in enumerate(kernels):
            key = RandomKey(config["seed"], 0, KeyDirection.KEPT, KeyStage.FLAT, 0, rank).fold()
            values = simulated.shards[rank]["weight"].detach().flatten()
            expected = each.gather(values, key, TRAINED, step, 200, 0.25)
            assert torch.equal(decoded[-1].chunk(4)[rank].flatten(), expected)
        simulated.step([[torch.randn(100)] * 4])
        for shards in simulated.shards:
            with torch.no_grad():
                shards["weight"][:8] *= 1.5 - step  # out of their grids
    assert not torch.equal(decoded[0], decoded[2])


class Matrix(nn.Module):
    """A model of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 100))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x).square().mean()


def test_each_bucket_is_due_once_in_every_so_many_steps_and_as_many_in_each() -> None:
    every, num = 4, 64 * 100 // 8
    config = {**DELTA, "delta_redraw_every": every}
    simulated = simulation(config, Matrix(), groups=[], world_size=2, optimizer=rate(0.0))
    drawn = []
    for step in range(3 * every + 1):
        before = epochs(simulated, "weight") if step else torch.tensor(0)
        simulated.step([[torch.randn(100), torch.randn(100)]])
        now = epochs(simulated, "weight")
        drawn.append(now == step)
        assert torch.equal(now, torch.where(drawn[-1], step, before))
    assert drawn[0].all()
    for step in range(1, len(drawn)):
        # Two ranks whose buckets are alike: a coin a bucket of one of them.
        deviation = 2 * (num / 2 * (every - 1)) ** 0.5 / every
        assert abs(int(drawn[step].sum()) - num / every) < 5 * deviation
        if step > every:
            assert torch.equal(drawn[step], drawn[step - every])
    assert torch.stack(drawn[1 : every + 1]).sum(0).eq(1).all()


def test_what_is_kept_is_12_bytes_a_bucket_of_coded_weights() -> None:
    config = {"weight_bits": 4, "gather": "delta", "policy": (("out.*", 16),)}
    simulated = simulation(config, world_size=3)
    simulated.step(batches(0, 3))
    shards = [own for shards in simulated.shards for own in shards.items()]
    coded = [own.numel() for name, own in shards if own.dim() == 2 and name != "out.weight"]
    kept = [part for each in grids(simulated).values() for part in each]
    assert sum(part.nbytes for part in kept) == 12 * sum(-(-num // 128) for num in coded)
    assert sum(part.untyped_storage().nbytes() for part in kept) <= sum(p.nbytes for p in kept)


def test_codes_have_no_history() -> None:
    config, seed = {**DELTA, "weight_bits": 8}, random.randrange(1 << 60)
    long, short = (simulation({**config, "seed": seed}, optimizer=rate(0.0)) for _ in range(2))
    name = "block.0.weight"
    first = [each.weights()[name] for each in (long, short)]
    there = [torch.randn_like(own[name]).mul_(1e-3) for own in long.shards]
    for step in range(4):
        for simulated in (long, short):
            for own, by in zip(simulated.shards, there, strict=True):
                with torch.no_grad():
                    if simulated is long:  # several ways and back, in small steps
                        own[name].add_(by, alpha=(3, -5, 4, -1)[step])
                    elif step == 3:
                        own[name].add_(by)
            simulated.step(batches(step, 4))
    for places in zip(grids(long).items(), grids(short).items(), strict=True):
        (place, one), (_, other) = places
        assert all(map(torch.equal, one, other)), place
        assert not one.epoch.any()
    found = [each.weights()[name] for each in (long, short)]
    assert not torch.equal(found[0], first[0])
    assert torch.equal(found[0], found[1])


class Watching(Net):
    """Keeps the weights that its passes compute with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.block[0].register_forward_hook(
            lambda module, *_: self.seen.append(module.weight.detach().clone())
        )


def test_a_validation_between_two_steps_changes_nothing_and_sees_what_the_next_step_does() -> None:
    config = {**DELTA, "delta_redraw_every": 3}
    model = Watching()
    with_it, without = simulation(config, model), simulation(config)
    for step in range(7):
        validated = [with_it.weights(), with_it.weights()]
        assert_same(*validated)
        model.seen.clear()
        for simulated in (with_it, without):
            simulated.step(batches(step, 4))
        assert torch.equal(model.seen[0], validated[0]["block.0.weight"])
    assert_same(with_it.state(), without.state())
    for place, kept in grids(without).items():
        assert all(map(torch.equal, kept, grids(with_it)[place])), place
    found = epochs(without, "block.0.weight")
    assert set(found.tolist()) == {4, 5, 6}  # all were due since


def test_weights_never_leave_their_grids_however_far_they_go() -> None:
    simulated = simulation({**DELTA, "delta_redraw_every": 1000}, optimizer=rate(3.0))
    for step in range(5):
        simulated.step(batches(step, 4))
        exact = simulated.state()
        for name, value in simulated.weights().items():
            for rank, (one, other) in enumerate(
                zip(*(each.chunk(4) for each in (exact[name], value)), strict=True)
            ):
                if (kept := grids(simulated).get((name, rank))) is None:
                    assert torch.equal(one, other)
                    continue
                # A value is rounded by half a step at most, and by a few ulps of what is added.
                width = kept.scale.abs().repeat_interleave(8)[: one.numel()]
                error = (one - other).abs().flatten()
                assert (error <= 0.51 * width + 1e-6).all()
    last = epochs(simulated, "block.0.weight")
    assert 0 < int((last > 0).sum()), "nothing has left its grid"


def test_frozen_weights_are_drawn_anew_where_they_are_edited_alone() -> None:
    model, name = Net(), "block.0.weight"
    model.block[0].weight.requires_grad_(False)
    simulated = simulation({**DELTA, "delta_redraw_every": 1}, model)
    decoded = []
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                simulated.shards[1][name][0, 3] = 9.0
        simulated.step(batches(step, 4))
        decoded.append(simulated.weights()[name])
        assert (epochs(simulated, "out.weight") == step + 1).all()
    found = {
        rank: kept.epoch.tolist() for (own, rank), kept in grids(simulated).items() if own == name
    }
    buckets = len(found[0])
    assert found == {r: [3 if (r, b) == (1, 0) else 0 for b in range(buckets)] for r in range(4)}
    assert torch.equal(decoded[2], decoded[0])
    assert torch.equal(decoded[5], decoded[3])
    assert abs(float(decoded[3][5, 3]) - 9) < 0.5
    other = decoded[3] != decoded[2]
    assert other.view(4, -1)[[0, 2, 3]].sum() + other.view(4, -1)[1, 8:].sum() == 0


def test_a_group_that_rests_is_not_gathered_and_keeps_its_grids() -> None:
    simulated = simulation({**DELTA, "delta_redraw_every": 1}, Resting())
    found = []
    for step, is_used in enumerate([False, True, False, False, True]):
        rest(simulated, step, is_used)
        is_there = ("block.0.weight", 0) in grids(simulated)
        block = set(epochs(simulated, "block.0.weight").tolist()) if is_there else None
        found.append((set(epochs(simulated, "embed.weight").tolist()), block))
    assert found == [({0}, None), ({1}, {1}), ({2}, {1}), ({3}, {1}), ({4}, {4})]


def test_one_rank_keeps_nothing_and_is_plain_training() -> None:
    simulated = simulation({**DELTA, "grad_bits": 2}, world_size=1)
    assert_same(run(simulated, num_ranks=1), train_plainly(Net(), 1))
    assert grids(simulated) == {}


@pytest.mark.parametrize("rounding", [None, "nearest"])
def test_more_bits_and_less_room_leave_less_error(rounding: str | None) -> None:
    errors = []
    for bits, room in ((3, 0.25), (5, 1.0), (5, 0.25), (8, 0.25)):
        config = {"weight_bits": bits, "embedding_bits": bits, "rounding": rounding}
        simulated = simulation({**config, "gather": "delta", "delta_room": room})
        decoded, exact = simulated.weights(), simulated.state()
        errors.append(error(decoded, exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[2] > 64 * errors[3] > 0
