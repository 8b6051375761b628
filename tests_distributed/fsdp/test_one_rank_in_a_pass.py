"""One rank differs in a forward or backward pass: all ranks raise one sentence, and none hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.one_rank import (
    BACKWARD,
    FORWARD,
    ONCE,
    UP,
    Act,
    Point,
    Stage,
    apart,
    assert_said,
    differs,
    forward,
    in_no_grad,
    load_other_bits,
    load_state,
    mistaken,
    say_at_each,
    set_masks,
    set_pruned,
    train,
)
from tests_distributed.support.running import Run, selection


def _in_exact(stage: Stage) -> None:
    with stage.handle.exact():
        stage.forward()


def _in_inference_mode(stage: Stage) -> None:
    with torch.inference_mode():
        stage.forward()


def _with_state(**changes: Any) -> Act:
    """Load the handle's own state with changes, and go on."""

    def act(stage: Stage) -> None:
        stage.handle.load_state_dict(stage.handle.state_dict() | changes)
        stage.forward()

    return act


def _with_other_bits(stage: Stage) -> None:
    load_other_bits(stage)
    stage.forward()


def _with_other_levels(stage: Stage) -> None:
    state = stage.handle.state_dict()
    changed = [[*row[:3], *(each * each for each in row[3:])] for row in state["levels"]]
    stage.handle.load_state_dict(state | {"levels": changed})
    stage.forward()


def _frozen(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    stage.forward()


def _in_eval_mode(stage: Stage) -> None:
    stage.model.eval()
    stage.forward()


def _with_masks_lifted(stage: Stage) -> None:
    stage.handle.set_support(None)
    stage.forward()


def _with_a_pruned_weight_set(stage: Stage) -> None:
    with torch.no_grad():
        stage.parameter(UP).to_local()[:1] = 1.0
    stage.forward()


def _forward_and_train(stage: Stage) -> None:
    loss = stage.forward()
    stage.train()
    torch.autograd.backward(loss)


def _backward_twice(stage: Stage) -> None:
    loss = stage.forward()
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)


def _train_twice(stage: Stage) -> None:
    stage.train()
    stage.train()


def _without_sync(stage: Stage) -> None:
    stage.model.set_requires_gradient_sync(False)
    stage.train()


def _unforced(stage: Stage) -> None:
    stage.model.blocks[0].mlp.set_force_sum_reduction_for_comms(False)


def _told(method: str, *args: Any, passes: int = 1) -> Act:
    """Tell FSDP2 something of the MLP alone, and train."""

    def act(stage: Stage) -> None:
        getattr(stage.model.blocks[0].mlp, method)(*args)
        for _ in range(passes):
            stage.train()

    return act


def _ahead(direction: str) -> Act:
    """Let FSDP2 gather the MLP ahead of time."""

    def act(stage: Stage) -> None:
        block = stage.model.blocks[0]
        getattr(stage.model, f"set_modules_to_{direction}_prefetch")([block, block.mlp])
        stage.train()

    return act


def _between(change: Act) -> Act:
    """Change something between a forward pass and its backward pass."""

    def act(stage: Stage) -> None:
        loss = stage.forward()
        change(stage)
        torch.autograd.backward(loss)

    return act


def _backward_in_exact(stage: Stage) -> None:
    loss = stage.forward()
    with stage.handle.exact():
        torch.autograd.backward(loss)


def _glance(stage: Stage) -> None:
    with stage.handle.exact():
        pass


def _freeze_unsharded(stage: Stage) -> None:
    stage.model.blocks[0].mlp.up.weight.requires_grad_(False)


PASSES = {
    "exact in the backward pass": Point(
        there=_backward_in_exact,
        elsewhere=train,
        says=differs(BACKWARD, "weights", "exact", "quantized"),
    ),
    "exact in between": Point(
        before=lambda stage: stage.model.set_reshard_after_forward(False),
        there=_between(_glance),
        elsewhere=train,
        says=differs(BACKWARD, "gathered groups", ".*", ".*"),
    ),
    "exact in between with payloads kept": Point(
        before=lambda stage: stage.model.set_reshard_after_forward(False, recurse=False),
        there=_between(_glance),
        elsewhere=train,
        says=differs(BACKWARD, "gathered groups", ".*", ".*"),
        config=ONCE,
    ),
    "masks lifted in between": Point(
        before=set_pruned,
        there=_between(lambda stage: stage.handle.set_support(None)),
        elsewhere=train,
        says=differs(BACKWARD, "masks", "lifted", "of call 1 of set_support"),
    ),
    "a state loaded in between": Point(
        there=_between(lambda stage: load_state(stage, seed=3)),
        elsewhere=train,
        says=differs(BACKWARD, "the seed", "3", "0"),
    ),
    "frozen in between": Point(
        there=_between(_freeze_unsharded),
        elsewhere=train,
        says=differs(BACKWARD, "frozen parameters", UP, "none"),
        config=ONCE,
    ),
    "what is due": Point(
        before=train,
        there=lambda stage: (load_state(stage, step=1, reduced=0), stage.forward()),
        elsewhere=forward,
        says=differs(FORWARD, "due before it", "nothing", "bits"),
        config={"budget": 5},
    ),
    "levels that are due": Point(
        before=train,
        there=lambda stage: (load_state(stage, step=1, reduced=0), stage.forward()),
        elsewhere=forward,
        says=differs(FORWARD, "due before it", "nothing", "levels"),
        config={"levels": "learned", "weight_bits": 4, "level_steps": (1,)},
    ),
    "exact": Point(
        there=_in_exact,
        elsewhere=forward,
        says=differs(FORWARD, "weights", "exact", "quantized"),
    ),
    "no_grad": Point(
        there=in_no_grad, elsewhere=train, says=differs(FORWARD, "gradients", "off", "on")
    ),
    "inference mode": Point(
        there=_in_inference_mode,
        elsewhere=train,
        says=differs(FORWARD, "gradients", "in inference mode", "on"),
    ),
    "an evaluation after a step": Point(
        before=train,
        there=in_no_grad,
        elsewhere=train,
        says=differs(FORWARD, "gradients", "off", "on"),
    ),
    "step": Point(
        before=train,
        there=_with_state(step=7, reduced=0),
        elsewhere=forward,
        says=differs(FORWARD, "step", "7", "1"),
    ),
    "seed": Point(
        there=_with_state(seed=7),
        elsewhere=forward,
        says=differs(FORWARD, "the seed", "7", "0"),
    ),
    "bits": Point(
        there=_with_other_bits,
        elsewhere=lambda stage: (stage.handle.state_dict(), stage.forward()),
        says=differs(FORWARD, "bits and levels", r"\w+", r"\w+"),
        config={"budget": 5},
    ),
    "levels": Point(
        before=train,
        there=_with_other_levels,
        elsewhere=lambda stage: (stage.handle.state_dict(), stage.forward()),
        says=differs(FORWARD, "bits and levels", r"\w+", r"\w+"),
        config={"levels": "learned", "weight_bits": 4, "level_steps": (1,)},
    ),
    "frozen": Point(
        there=_frozen,
        elsewhere=forward,
        says=differs(FORWARD, "frozen parameters", UP, "none"),
    ),
    "frozen and sent once": Point(
        before=train,
        there=_frozen,
        elsewhere=train,
        says=differs(FORWARD, "frozen parameters", UP, "none"),
        config=ONCE,
    ),
    "eval mode": Point(
        there=_in_eval_mode,
        elsewhere=train,
        says=differs(FORWARD, "groups in eval mode", "embed.weight.*", "none"),
        config=ONCE,
    ),
    "masks lifted": Point(
        before=set_masks(UP),
        there=_with_masks_lifted,
        elsewhere=train,
        says=differs(FORWARD, "masks", "lifted", "of call 1 of set_support"),
    ),
    "a pruned weight that is not zero": Point(
        before=set_pruned,
        there=_with_a_pruned_weight_set,
        elsewhere=forward,
        says=lambda rank, odd: (
            ".*zero.*" if rank == odd else f"rank {odd} cannot send its part of the group of .*"
        ),
    ),
    "a forward pass more": Point(
        there=_forward_and_train, elsewhere=train, says=apart(FORWARD, BACKWARD)
    ),
    "a forward pass more after a step": Point(
        before=train,
        there=_forward_and_train,
        elsewhere=train,
        says=apart(FORWARD, BACKWARD),
        config=ONCE,
    ),
    "no backward pass": Point(
        there=_forward_and_train, elsewhere=_train_twice, says=apart(FORWARD, BACKWARD)
    ),
    "two backward passes": Point(
        there=_backward_twice, elsewhere=_train_twice, says=apart(BACKWARD, FORWARD)
    ),
    "no gradient sync": Point(
        there=_told("set_requires_gradient_sync", False),
        elsewhere=train,
        says=differs(BACKWARD, "groups that are not reduced", "blocks.0.mlp.*", "none"),
    ),
    "an all-gather of its own": Point(
        there=_told("set_custom_all_gather", None),
        elsewhere=train,
        says=mistaken(FORWARD, "set_custom_all_gather was called on the group of .*"),
    ),
    "a sum that is not forced": Point(
        there=_between(_unforced),
        elsewhere=train,
        says=mistaken(BACKWARD, r"set_force_sum_reduction_for_comms\(False\) was called on .*"),
    ),
    "kept after the forward pass": Point(
        there=_told("set_reshard_after_forward", False),
        elsewhere=train,
        says=differs(FORWARD, "groups that stay .* for the backward", "blocks.0.mlp.*", ".*"),
    ),
    "kept after the backward pass": Point(
        there=_told("set_reshard_after_backward", False),
        elsewhere=train,
        says=differs(FORWARD, "groups that stay .* after the backward", "blocks.0.mlp.*", "none"),
    ),
    "not gathered in the backward pass": Point(
        there=_told("set_unshard_in_backward", False),
        elsewhere=train,
        says=differs(BACKWARD, "groups that are not gathered again", "blocks.0.mlp.*", "none"),
    ),
    "gathered ahead in the forward pass": Point(
        there=_ahead("forward"),
        elsewhere=train,
        says=differs(FORWARD, "groups that are gathered ahead", "blocks.0.* on", "none"),
    ),
    "gathered ahead in the backward pass": Point(
        there=_ahead("backward"),
        elsewhere=train,
        says=differs(BACKWARD, "groups that are gathered ahead", "blocks.0.* on", "none"),
    ),
}


TABLES = {"passes": PASSES}


def go_through(table: str, odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    return say_at_each(TABLES[table], odd)


@pytest.mark.parametrize("table", TABLES)
@selection("ranks,odd", [(3, -1)], [2, 3], [0, -1])
def test_when_one_rank_differs_all_raise_and_say_how(
    run: Run, table: str, ranks: int, odd: int
) -> None:
    assert_said(TABLES[table], run(ranks, go_through, table, odd), odd)


# --- what may differ --------------------------------------------------------------------------


def _edit_frozen_on_one_rank(gather: str, odd: int) -> list[Tensor]:
    """Losses before and after one rank edits its shard of a frozen weight, and after a step."""
    odd %= dist.get_world_size()
    model: Any = make_model(num_layers=1)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    handle = qsdp.install(shard(model), qsdp.QSDPConfig(gather=gather, weight_bits=32))
    batch = make_batch(model, 0, rank=0)
    losses = []
    for is_edited in (False, True, False):
        if is_edited and dist.get_rank() == odd:
            model.blocks[0].mlp.reshard()
            with torch.no_grad():
                model.get_parameter(UP).to_local().add_(1.0)
        loss = model(*batch)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        model.zero_grad()
    handle.remove()
    return losses


@selection("ranks,odd", [(2, 0), (3, -1)], [2, 3], [0, -1])
def test_all_ranks_see_what_one_rank_edits(run: Run, ranks: int, odd: int) -> None:
    (expected, *_), (found, *others) = (
        run(ranks, _edit_frozen_on_one_rank, gather, odd) for gather in ("twice", "once")
    )
    assert expected[1] != expected[0]
    for losses in (found, *others):
        assert losses == expected
