"""One rank differs in a call of the handle: all ranks raise one sentence, and none hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from tests_distributed.support.one_rank import (
    DOWN,
    FORWARD,
    ONCE,
    SUPPORT,
    UP,
    Act,
    Point,
    Stage,
    apart,
    assert_said,
    differs,
    forward,
    load_other_bits,
    load_state,
    mistaken,
    say_at_each,
    set_masks,
    train,
)
from tests_distributed.support.running import Run, selection


def _mask_of(change: Callable[[Any, Tensor], tuple[Any, Tensor]]) -> Act:
    def act(stage: Stage) -> None:
        ((parameter, mask),) = stage.masks(UP).items()
        parameter, mask = change(parameter, mask)
        stage.handle.set_support({parameter: mask})

    return act


def _then_forward(method: str, *args: Any) -> Act:
    def act(stage: Stage) -> None:
        getattr(stage.handle, method)(*args)
        stage.forward()

    return act


def _measuring(stage: Stage) -> None:
    with stage.handle.measuring():
        stage.train()
    stage.handle.errors()


def _train_and_measure(stage: Stage) -> None:
    stage.train()
    stage.handle.errors()


def _asks_for_errors(change: Act) -> Act:
    """Change something, and ask for the errors."""

    def act(stage: Stage) -> None:
        change(stage)
        stage.handle.errors()

    return act


def _load_own_grids(stage: Stage) -> None:
    stage.handle.load_grids(stage.handle.grids())
    stage.forward()


ERRORS = "handle.errors"
LOAD_GRIDS = "handle.load_grids"
DELTA = {"gather": "delta", "weight_bits": 4}
LEARNED = {"levels": "learned", "weight_bits": 4}

HANDLE = {
    "masks on one rank alone": Point(
        there=set_masks(UP),
        elsewhere=_then_forward("set_support", None),
        says=apart(SUPPORT, FORWARD),
    ),
    "masks of nothing on one rank": Point(
        there=_then_forward("set_support", {}),
        elsewhere=set_masks(UP),
        says=apart(FORWARD, SUPPORT),
    ),
    "masks of other parameters": Point(
        there=set_masks(DOWN),
        elsewhere=set_masks(UP),
        says=differs(SUPPORT, "masks of", DOWN, UP),
    ),
    "masks of more parameters": Point(
        there=set_masks(DOWN, UP),
        elsewhere=set_masks(UP),
        says=differs(SUPPORT, "masks of", DOWN, "1 others"),
    ),
    "with_grads": Point(
        there=set_masks(UP, with_grads=False),
        elsewhere=set_masks(UP),
        says=differs(SUPPORT, "with_grads", "False", "True"),
    ),
    "a mask of another shape": Point(
        there=_mask_of(lambda p, mask: (p, mask[:, 1:])),
        elsewhere=set_masks(UP),
        says=mistaken(SUPPORT, r"a mask has shape \(\d, 9\), but the local part .*"),
    ),
    "a mask of another type": Point(
        there=_mask_of(lambda p, mask: (p, mask.float())),
        elsewhere=set_masks(UP),
        says=mistaken(SUPPORT, r"a mask is a Tensor of torch.float32: give a bool tensor .*"),
    ),
    "a mask of another model's parameter": Point(
        there=_mask_of(lambda p, mask: (nn.Parameter(p.detach().clone()), mask)),
        elsewhere=set_masks(UP),
        says=mistaken(SUPPORT, "a mask is given for a tensor of shape .* FSDP2 does not shard .*"),
    ),
    "measuring": Point(
        there=_measuring,
        elsewhere=_train_and_measure,
        says=differs("handle.errors", "measured gradients", "True", "False"),
    ),
    "errors": Point(
        there=_then_forward("errors"), elsewhere=forward, says=apart("handle.errors", FORWARD)
    ),
    "errors in a step": Point(
        before=train,
        there=_then_forward("errors"),
        elsewhere=train,
        says=apart("handle.errors", FORWARD),
        config=LEARNED,
    ),
    "errors at another step": Point(
        before=train,
        there=_asks_for_errors(lambda stage: load_state(stage, step=4, reduced=0)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "step", "4", "1"),
    ),
    "errors of other bits": Point(
        there=_asks_for_errors(load_other_bits),
        elsewhere=_asks_for_errors(lambda stage: stage.handle.state_dict()),
        says=differs(ERRORS, "bits and levels", r"\w+", r"\w+"),
        config={"budget": 5},
    ),
    "errors where bits are due": Point(
        before=train,
        there=_asks_for_errors(lambda stage: load_state(stage, step=1, reduced=0)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "due before it", "nothing", "bits"),
        config={"budget": 5},
    ),
    "errors without masks": Point(
        before=set_masks(UP),
        there=_asks_for_errors(lambda stage: stage.handle.set_support(None)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "masks", "lifted", "of call 1 of set_support"),
    ),
    "errors of frozen parameters": Point(
        there=_asks_for_errors(lambda stage: stage.parameter(UP).requires_grad_(False)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "frozen parameters", UP, "none"),
        config=ONCE,
    ),
    "state_dict": Point(
        there=_then_forward("state_dict"),
        elsewhere=forward,
        says=apart("handle.state_dict", FORWARD),
        config=LEARNED,
    ),
    "state_dict with a budget": Point(
        before=train,
        there=_then_forward("state_dict"),
        elsewhere=_then_forward("errors"),
        says=apart("handle.state_dict", "handle.errors"),
        config={"budget": 5},
    ),
    "state_dict at another step": Point(
        before=train,
        there=lambda stage: (load_state(stage, step=4, reduced=0), stage.handle.state_dict()),
        elsewhere=_then_forward("state_dict"),
        says=differs("handle.state_dict", "step", "4", "1"),
        config={"budget": 5},
    ),
    "grids with a budget": Point(
        before=train,
        there=_then_forward("grids"),
        elsewhere=_then_forward("state_dict"),
        says=apart("handle.grids", "handle.state_dict"),
        config={"budget": 5},
    ),
    "load_grids on one rank alone": Point(
        before=train,
        there=_load_own_grids,
        elsewhere=forward,
        says=apart(LOAD_GRIDS, FORWARD),
        config=DELTA,
    ),
    "load_grids at another step": Point(
        before=train,
        there=lambda stage: (load_state(stage, step=4, reduced=0), _load_own_grids(stage)),
        elsewhere=_load_own_grids,
        says=differs(LOAD_GRIDS, "step", "4", "1"),
        config=DELTA,
    ),
    "load_grids without any": Point(
        before=train,
        there=_then_forward("load_grids", {}),
        elsewhere=_load_own_grids,
        says=differs(LOAD_GRIDS, "grids", "none", r"embed\.weight\.min, .* more"),
        config=DELTA,
    ),
    "remove": Point(
        there=_then_forward("remove"), elsewhere=forward, says=apart("handle.remove", FORWARD)
    ),
    "remove before errors": Point(
        there=_then_forward("remove"),
        elsewhere=_then_forward("errors"),
        says=apart("handle.remove", "handle.errors"),
    ),
    "remove before masks": Point(
        there=_then_forward("remove"),
        elsewhere=set_masks(UP),
        says=apart("handle.remove", SUPPORT),
    ),
}


TABLES = {"handle": HANDLE}


def go_through(table: str, odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    return say_at_each(TABLES[table], odd)


@pytest.mark.parametrize("table", TABLES)
@selection("ranks,odd", [(3, -1)], [2, 3], [0, -1])
def test_when_one_rank_differs_all_raise_and_say_how(
    run: Run, table: str, ranks: int, odd: int
) -> None:
    assert_said(TABLES[table], run(ranks, go_through, table, odd), odd)
