"""``qsdp.simulate`` in one process: what it must equal, what it counts, what it refuses.

tests_distributed/simulation/test_simulation.py compares it with real processes, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from qsdp.codec.payload import Layout, Segment
from qsdp.codec.random_numbers import RandomKey
from qsdp.common.dtypes import DType
from qsdp.compat.parameter_names import named_parameters
from tests.support.simulated import (
    Net,
    assert_same,
    batch,
    batches,
    error,
    run,
    simulation,
    train_plainly,
)


def test_one_rank_is_plain_training_to_the_bit() -> None:
    simulated = simulation({"weight_bits": 2, "grad_bits": 2}, world_size=1)
    assert_same(run(simulated, num_ranks=1), train_plainly(Net(), 1))


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_raw_values_are_the_mean_gradient_of_all_ranks(ranks: int) -> None:
    simulated = simulation(
        {"weight_bits": 32, "grad_bits": 32, "embedding_bits": 32}, world_size=ranks
    )
    assert_same(run(simulated, num_ranks=ranks), train_plainly(Net(), ranks), 1e-6)


@pytest.mark.parametrize(
    "world",
    [
        {"world_size": 4, "ranks_per_node": 2},
        {"world_size": 6, "ranks_per_node": 2},
        {"world_size": 6, "ranks_per_node": 3},
        {"world_size": 3, "ranks_per_node": 3},
        {"world_size": 3, "ranks_per_node": 1},
        {"world_size": 2, "replicas": 3},
        {"world_size": 2, "replicas": 3, "quantized_replicas": True},
        {"world_size": 4, "ranks_per_node": 2, "replicas": 2, "quantized_replicas": True},
    ],
)
def test_every_way_to_reduce_is_the_same_sum_but_for_rounding(world: dict[str, Any]) -> None:
    num_ranks = world["world_size"] * world.get("replicas", 1)
    raw = {"weight_bits": 32, "grad_bits": 32, "embedding_bits": 32}
    reduce = "two-hop" if "ranks_per_node" in world else "flat"
    state = run(simulation({**raw, "reduce": reduce}, **world), num_ranks=num_ranks)
    assert_same(state, train_plainly(Net(), num_ranks), 1e-6)


@pytest.mark.parametrize(
    "world",
    [
        {"ranks_per_node": 4},
        {"ranks_per_node": 9},
        {"ranks_per_node": 1},
        {"ranks_per_node": 2, "world_size": 2, "replicas": 2},
    ],
)
def test_two_hops_of_which_one_has_nothing_to_do_are_flat(world: dict[str, Any]) -> None:
    hops, flat = (
        simulation({"grad_bits": 3, "reduce": reduce}, **world) for reduce in ("two-hop", "flat")
    )
    assert hops.wire_bytes() == flat.wire_bytes()
    assert_same(run(hops), run(flat))


@pytest.mark.parametrize("options", [{}, {"ranks_per_node": 2}, {"replicas": 2}])
@pytest.mark.parametrize("quantized_replicas", [False, True])
def test_more_bits_leave_less_error(options: dict[str, Any], quantized_replicas: bool) -> None:
    options = options | {"quantized_replicas": quantized_replicas and "replicas" in options}
    num_ranks = 4 * options.get("replicas", 1)
    exact = train_plainly(Net(), num_ranks)
    errors = [
        error(
            run(
                simulation(
                    {"embedding_bits": bits, "weight_bits": bits, "grad_bits": bits}, **options
                ),
                num_ranks=num_ranks,
            ),
            exact,
        )
        for bits in (3, 5, 8, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


class Dot(nn.Module):
    """The gradient of its weight is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 40))

    def forward(self, grad: Tensor) -> Tensor:
        return (self.weight * grad).sum()


def cross(values: Tensor, bits: int, seed: int, hop: int, sender: int, receiver: int) -> Tensor:
    """The codec alone: ``values`` of a ``Dot``'s gradient after one hop in step 0."""
    num = values.numel()
    segment = Segment(bits=bits, dtype=DType.FP32, padded=num, parameter=0, bucket=16, rounding=1)
    layout = Layout([segment], 0)
    payload, decoded = torch.empty(layout.payload_bytes, dtype=torch.uint8), torch.empty(num)
    table = torch.tensor(layout.table([num]))
    key = RandomKey(seed, 0, 1, hop, 0, sender, receiver).fold()
    sent = values.flatten().view(torch.uint8)
    torch.ops.qsdp.encode(sent, table, key, layout.header(0, 0), payload)
    torch.ops.qsdp.decode(payload, table, key, decoded.view(torch.uint8))
    return decoded.view_as(values)


def reduced(grads: Tensor, config: dict[str, Any], **world: Any) -> Tensor:
    """The gradient of a ``Dot`` whose ranks had ``grads`` [ranks, 4, 40]."""
    simulated = simulation(
        {"bucket_size": 16, "rounding": "dither", **config}, Dot(), groups=[], **world
    )
    simulated.pass_([list(grads)])
    return simulated.grads()["weight"]


def test_two_hops_are_those_of_the_design() -> None:
    seed = random.randrange(1 << 60)
    grads, expected = torch.randn(4, 4, 40), []
    for receiver in range(4):
        total = torch.zeros(40)
        for node in range(2):
            peer = 2 * node + receiver % 2
            partial = torch.zeros(40)
            for sender in (2 * node, 2 * node + 1):
                row = grads[sender, receiver]
                partial += row if sender == peer else cross(row, 5, seed, 1, sender, receiver)
            is_own = node == receiver // 2
            total += partial if is_own else cross(partial, 3, seed, 2, peer, receiver)
        expected.append(total / 4)
    config = {"grad_bits": 3, "local_grad_bits": 5, "reduce": "two-hop", "seed": seed}
    found = reduced(grads, config, ranks_per_node=2)
    assert torch.equal(found, torch.stack(expected))


def test_replicas_are_averaged_as_in_the_design() -> None:
    seed = random.randrange(1 << 60)
    grads, expected = torch.randn(6, 4, 40), []
    for receiver in range(2):
        rows = slice(2 * receiver, 2 * receiver + 2)
        total = torch.zeros(2, 40)
        for replica in range(3):
            own, other = 2 * replica + receiver, 2 * replica + 1 - receiver
            theirs = cross(grads[other, rows], 4, seed, 0, other, receiver)
            total += cross(grads[own, rows] + theirs, 4, seed, 3, own, receiver)
        expected.append(total / 3 / 2)
    world = {"world_size": 2, "replicas": 3, "quantized_replicas": True}
    found = reduced(grads, {"grad_bits": 4, "seed": seed}, **world)
    assert torch.equal(found, torch.cat(expected))


def test_numbers_depend_on_keys_and_not_on_what_was_called_before() -> None:
    first, second = simulation({"weight_bits": 4}), simulation({"weight_bits": 4})
    for step in range(3):
        first.weights()
        first.step(batches(step, 4))
        simulation({"weight_bits": 4}).step(batches(9, 4))
        second.step(batches(step, 4))
        assert first.clock == second.clock == step
    assert_same(first.state(), second.state())
    assert_same(first.weights(), second.weights())


def test_every_step_seed_and_group_draws_other_numbers() -> None:
    simulated = simulation({"weight_bits": 4}, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    first = simulated.weights()["block.0.weight"]
    simulated.step(batches(0, 4))
    assert torch.equal(simulated.weights()["block.0.weight"], first)  # validation: the same step
    simulated.step(batches(0, 4))
    assert not torch.equal(simulated.weights()["block.0.weight"], first)
    for other in (
        simulation({"weight_bits": 4, "seed": 1}),
        simulation({"weight_bits": 4}, groups=[]),
        simulation({"weight_bits": 4}, groups=["embed", "block"]),
    ):
        assert not torch.equal(other.weights()["block.0.weight"], first)


@pytest.mark.parametrize("as_given", [list, lambda model: [model.block], lambda model: [["block"]]])
def test_groups_may_be_modules_names_or_lists_and_the_root_always_is_one(
    as_given: Callable[[Net], list[Any]],
) -> None:
    model = Net()
    groups = ["block"] if as_given is list else as_given(model)
    for more in ([], [""], [model]):
        found = run(simulation({"weight_bits": 3}, model, groups=[*groups, *more]))
        assert_same(found, run(simulation({"weight_bits": 3})))


def test_modules_of_one_call_are_one_group() -> None:
    apart = simulation({"weight_bits": 4}, groups=["norm", "embed", "block"]).weights()
    together = simulation({"weight_bits": 4}, groups=["norm", ["embed", "block"]]).weights()
    assert torch.equal(apart["embed.weight"], together["embed.weight"])
    assert not torch.equal(apart["block.0.weight"], together["block.0.weight"])


def test_what_was_given_is_left_alone_and_recomputation_changes_nothing() -> None:
    model = Net(recompute=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    simulated = simulation({"weight_bits": 4, "grad_bits": 4}, model)
    state = run(simulated)
    assert_same(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert_same(state, run(simulation({"weight_bits": 4, "grad_bits": 4})))
    target = Net(seed=1)
    simulated.copy_to(target)
    assert_same(dict(target.named_parameters()), state)


def test_batches_may_be_keywords_and_outputs_need_a_loss() -> None:
    class Logits(Net):
        def forward(self, tokens_BT: Tensor) -> Any:
            return {"logits": self.out(self.norm(self.embed(tokens_BT)).mean(1))}

    def loss(output: Any) -> Tensor:
        return output["logits"].square().mean()

    tokens = [batch(rank)[0] for rank in range(4)]
    found = [
        simulation({}, Logits(), loss=loss).step([[make(t) for t in tokens]])
        for make in (lambda t: t, lambda t: [t], lambda t: {"tokens_BT": t})
    ]
    assert found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match="give `loss`"):
        simulation({}, Logits()).step([tokens])


def test_a_step_returns_the_mean_loss_and_clips() -> None:
    simulated, twin = simulation(), simulation()
    data = batches(0, 4, num_micro=2)
    losses = [loss for micro in twin.pass_(data) for loss in micro]
    assert len(losses) == 8
    assert simulated.step(data, max_norm=1e-3) == sum(losses) / 8
    norm = twin.clip(1e-3)
    whole = torch.cat([grad.flatten() for grad in twin.grads().values()])
    assert norm > 1e-3
    assert float(whole.norm()) == pytest.approx(1e-3, rel=1e-2)
    twin.update()
    assert_same(simulated.state(), twin.state())


def test_wire_bytes_are_those_of_hand_arithmetic() -> None:
    """40 values a rank: header 32, metadata 8 a bucket, codes from a multiple of 16 to one."""
    weights_bytes = 32 + 3 * 8 + 8 + 20 + 12  # 4 bits
    grads_bytes = 32 + 3 * 8 + 8 + 15 + 1  # 3 bits
    local_bytes = 32 + 3 * 8 + 8 + 40 + 8  # 8 bits inside a node
    config = {"weight_bits": 4, "grad_bits": 3, "bucket_size": 16}

    def counted(config: dict[str, Any], **options: Any) -> Any:
        options = {"groups": [], **options}
        return simulation(config, Dot(), **options)

    # Two nodes of two ranks: auto takes two hops.
    hops = counted(config, ranks_per_node=2).wire_bytes(reshard_after_forward=True)
    assert hops.gather_inter_node == 2 * weights_bytes
    assert hops.gather_intra_node == 2 * 2 * weights_bytes
    assert hops.reduce_inter_node == grads_bytes
    assert hops.reduce_intra_node == 2 * local_bytes
    assert hops.num_parameters == 160
    total = 6 * weights_bytes + grads_bytes + 2 * local_bytes
    assert hops.per_parameter == total / 160

    simulated = counted({**config, "reduce": "flat"}, ranks_per_node=2)
    found = simulated.wire_bytes(micro_batches=3)  # the root's group is gathered once
    assert (found.gather_intra_node, found.gather_inter_node) == (
        3 * weights_bytes,
        6 * weights_bytes,
    )
    assert (found.reduce_intra_node, found.reduce_inter_node) == (grads_bytes, 2 * grads_bytes)

    kept = counted({**config, "gather": "once"}).wire_bytes(reshard_after_forward=True)
    assert kept.gather == 3 * weights_bytes
    frozen = Dot()
    frozen.weight.requires_grad_(False)
    for gather, expected in (("once", 0), ("twice", 6 * weights_bytes)):
        found = simulation({**config, "gather": gather}, frozen, groups=[]).wire_bytes(
            reshard_after_forward=True
        )
        assert (found.gather, found.reduce) == (expected, 0)

    world = {"world_size": 4, "replicas": 3, "quantized_replicas": True, "ranks_per_node": 4}
    found = counted(config, **world).wire_bytes(rank=5)
    assert (found.reduce_intra_node, found.reduce_inter_node) == (3 * grads_bytes, 2 * grads_bytes)
    assert counted(config, world_size=1).wire_bytes().per_parameter == 0


def test_floating_point_inputs_are_cast_to_the_parameter_dtype() -> None:
    inputs = torch.randn(2, 4, 40)
    for batch_of in (lambda x: [x], lambda x: {"grad": x}):
        simulated = simulation(
            {"grad_bits": 32}, Dot(), groups=[], world_size=2, param_dtype=torch.bfloat16
        )
        simulated.pass_([[batch_of(each) for each in inputs]])
        expected = inputs.bfloat16().float().mean(0)
        assert torch.equal(simulated.grads()["weight"], expected)


def test_a_warm_up_is_exact_and_ends() -> None:
    bits = {"weight_bits": 2, "grad_bits": 2, "embedding_bits": 2, "warmup_steps": 2}
    simulated, exact = simulation(bits), train_plainly(Net(), 4, steps=2)
    assert_same(run(simulated, steps=2), exact, 1e-6)
    simulated.step(batches(2, 4))
    assert error(simulated.state(), train_plainly(Net(), 4, steps=3)) > 1e-4


def test_masks_that_change_with_every_step_leave_no_tables_behind() -> None:
    simulated = simulation()
    with pytest.raises(ValueError, match="with_grads is False without masks"):
        simulated.set_support(None, with_grads=False)
    kept = []
    for step in range(12):
        mask = torch.rand(20, 12) < 0.5
        for rows, keep in zip(simulated.shards, mask.chunk(4), strict=True):
            with torch.no_grad():
                rows["block.0.weight"].masked_fill_(~keep, 0)
        simulated.set_support({"block.0.weight": mask})
        simulated.step(batches(step, 4))
        kept.append(len(simulated._wire.codec._tables))
    assert max(kept) < kept[0] + 8


def test_a_frozen_parameter_kept_for_good_is_decoded_alike_in_every_step() -> None:
    decoded = []
    for gather in ("once", "twice"):
        model = Net()
        model.block[0].weight.requires_grad_(False)
        simulated = simulation({"gather": gather, "weight_bits": 4, "warmup_steps": 1}, model)
        for step in range(3):
            simulated.step(batches(step, 4))
            decoded.append(simulated.weights()["block.0.weight"])
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[1], decoded[2])
    assert not torch.equal(decoded[0], Net().block[0].weight)
    assert torch.equal(decoded[3], Net().block[0].weight)  # warm-up
    assert not torch.equal(decoded[4], decoded[5])


def _compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [_compiled, checkpoint_wrapper], ids=["compiled", "checkpointed"])
@pytest.mark.parametrize("is_whole", [False, True], ids=["block", "whole"])
def test_wrappers_change_neither_names_nor_numbers(
    wrap: Callable[[Any], Any], is_whole: bool
) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.block.register_buffer("scale", torch.ones(1))
            self.own = nn.Parameter(torch.ones(2, 2))

        def forward(self, tokens_BT: Tensor, targets_B: Tensor) -> Tensor:
            return super().forward(tokens_BT, targets_B) * self.own.mean()

    def make(is_wrapped: bool) -> Any:
        model = Counting()
        if is_wrapped and not is_whole:
            model.block = wrap(model.block)
        return wrap(model) if is_wrapped and is_whole else model

    policy = (("block.0.weight", 4), ("own", 3))
    mask = torch.ones(20, 12, dtype=torch.bool)
    mask[3:7] = False
    found, expected = (
        simulation({"policy": policy}, make(is_wrapped), groups=["block", "block.2"])
        for is_wrapped in (True, False)
    )
    for simulated in (found, expected):
        run(simulated)
        for rank, shard in enumerate(simulated.shards):
            shard["block.0.weight"].data[~mask.chunk(4)[rank]] = 0
        simulated.set_support({"block.0.weight": mask})
        simulated.step(batches(4, 4))
    assert_same(found.state(), expected.state())
    for is_wrapped in (True, False):
        model = make(is_wrapped)
        found.copy_to(model)
        assert_same(named_parameters(model), expected.state())
