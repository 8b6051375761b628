"""``second_pass`` under FSDP2, with the quantized wire and without, and under DDP.

See tests/methods/test_two_passes.py for one process.
"""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import qsdp
from tests.support.second_pass import make_net, net_batch
from tests.support.two_passes import CASES, FORMS, Case, Training, differing, is_advice
from tests_distributed.support.helpers import collected, make_batch, make_model, shard, wire_config
from tests_distributed.support.running import Run, selection

TOY = Case(options={}, toy={})
KINDS: dict[str, Any] = {
    # Ranks, and what the wire is set to.
    "fsdp": (2, None),
    "fsdp, kept": (3, None),
    "twice": (3, {"weight_bits": 8, "grad_bits": 8}),
    "once": (2, {"weight_bits": 8, "grad_bits": 8, "gather": "once"}),
    "once, 3 ranks": (3, {"weight_bits": 4, "grad_bits": 8, "gather": "once"}),
    "delta": (2, {"weight_bits": 8, "grad_bits": 8, "gather": "delta"}),
    "delta, 3 ranks": (3, {"weight_bits": 4, "grad_bits": 8, "gather": "delta"}),
    "ddp": (2, None),
    "ddp, views of buckets": (2, None),
}
SHARDED = [kind for kind in KINDS if not kind.startswith("ddp")]


def _training(kind: str, case: Case, form: str = "context", **options: Any) -> Training:
    if case.toy is None:
        model: Any = make_net(has_widened=False)
        get_batch: Callable[[int], Any] = lambda seed: net_batch(seed, dist.get_rank())  # noqa: E731
    else:
        model = make_model(1, num_layers=1, **case.toy)
        get_batch = lambda seed: make_batch(model, seed)  # noqa: E731
    called, config, handle = model, KINDS[kind][1], None
    if kind.startswith("ddp"):
        called = DistributedDataParallel(model, gradient_as_bucket_view="views" in kind)
    else:
        shard(model, nested=case.toy is not None, reshard="kept" not in kind)
    if config is not None:
        handle = qsdp.install(model, wire_config(16, **config))
    made = Training(case, form, model, get_batch, called=called, **options)
    if handle is not None and case.options is not None:
        made.optimizer.share_support(handle.set_support)
    return made


# --- the same as a closure -----------------------------------------------------------------------


def _compare_with_closures(kind: str, case: str, form: str) -> None:
    num_micro = 1 + (form == "context")
    mine, plain = (_training(kind, CASES[case], f, num_micro=num_micro) for f in (form, "closure"))
    for step in range(3):
        for each in (mine, plain):
            each.take(step)
        assert differing(mine.found(), plain.found()) == [], step


@selection(
    "kind, case, form",
    [
        *(("fsdp", "CrAM+ of a part", "context"), ("fsdp, kept", "SAM", "scaler")),
        *(("fsdp", "normalized", "number"), ("twice", "CrAM+", "context")),
        *(("twice", "clipped", "scaler"), ("once", "CrAM", "scaler")),
        *(("once, 3 ranks", "rounded", "context"), ("delta", "CrAM", "context")),
        *(("delta, 3 ranks", "clipped", "scaler"), ("delta", "SAM with buffers", "number")),
        *(("ddp", "CrAM+", "context"), ("ddp, views of buckets", "clipped CrAM", "scaler")),
    ],
    tuple(KINDS),
    tuple(CASES),
    FORMS,
)
def test_every_step_is_that_of_a_closure(run: Run, kind: str, case: str, form: str) -> None:
    if kind.startswith("ddp") and (CASES[case].toy or {}).get("unused"):
        pytest.skip("DDP waits for gradients of all that takes part")
    run(KINDS[kind][0], collected, _compare_with_closures, kind, case, form)


# --- steps that are left out ---------------------------------------------------------------------


def _skip(kind: str, form: str, in_pass: int) -> list[float]:
    is_odd = dist.get_rank() == 1
    mine, plain = (
        _training(kind, TOY, f, spoilt=(1, in_pass) if is_odd else None) for f in (form, "closure")
    )
    scales = []
    for step in range(4):
        before = mine.found()
        for each in (mine, plain):
            each.take(step)
        assert differing(mine.found(), plain.found()) == [], step
        after = mine.found()
        assert (after["weights"] == before["weights"]) == (step == 1)
        assert (after["moments"] == before["moments"]) == (step == 1)
        assert mine.optimizer.skipped_steps == (step >= 1)
        scales.append(mine.scaler.get_scale())
    return scales


@selection(
    "kind, form, in_pass",
    [
        *(("fsdp", "scaler", 1), ("fsdp, kept", "context", 2), ("once", "scaler", 2)),
        *(("twice", "scaler", 1), ("ddp", "scaler", 2), ("ddp, views of buckets", "context", 1)),
    ],
    tuple(KINDS),
    ("context", "scaler"),
    (1, 2),
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    run: Run, kind: str, form: str, in_pass: int
) -> None:
    scales = run(KINDS[kind][0], collected, _skip, kind, form, in_pass)
    assert all(each == scales[0] for each in scales)
    if form == "scaler":  # it grows after two steps
        assert [b / a for a, b in zip(scales[0], scales[0][1:], strict=False)] == [0.5, 1.0, 2.0]


# --- what is refused -----------------------------------------------------------------------------


def _refuse(work: Callable[[], object], error: Any = RuntimeError, match: str = "") -> None:
    with pytest.raises(error, match=match) as caught:
        work()
    assert is_advice(str(caught.value)), str(caught.value)


def _end_alike(mine: Training, undisturbed: Training, what: str = "") -> None:
    for each in (mine, undisturbed):
        each.waiting(is_last=True)
        each.second(1)
        each.end()
        each.called.zero_grad()
        each.take(2)
    assert differing(mine.found(), undisturbed.found()) == [], what


def _begin(kind: str, case: Case, **options: Any) -> tuple[Training, Training]:
    pair = _training(kind, case, **options), _training(kind, case, **options)
    for each in pair:
        each.take(0)
        each.run_pass(1)
    return pair


def _unchanged(mine: Training, before: dict[str, Any]) -> None:
    found = differing(mine.found(), before)
    assert {"last_target", "last_grad_norm"}.issuperset(found), found


def _refuse_stale_losses(kind: str, toy: dict[str, Any], how: str) -> None:
    mine, undisturbed = _begin(kind, Case(options={}, toy=toy))
    before = mine.found()
    stale = [each.called(*each.batch(10)) for each in (mine, undisturbed)]

    def send_backward() -> None:
        with mine.optimizer.second_pass():
            fresh = mine.called(*mine.batch(10)) if how == "beside a fresh one" else 0
            if how == "after a fresh one":
                mine.run_pass(1)
            (stale[0] + fresh).backward()

    _refuse(send_backward, match="before the second pass")
    _unchanged(mine, before)
    _end_alike(mine, undisturbed)
    if isinstance(mine.called, FSDPModule):
        mine.run_pass(3)
        with mine.optimizer.second_pass():
            late = mine.called(*mine.batch(30))
            mine.run_pass(3)
        with pytest.raises(RuntimeError):
            late.backward()


@selection(
    "kind, toy, how",
    [
        *(("fsdp", 0, "alone"), ("fsdp", 1, "beside a fresh one"), ("fsdp, kept", 0, "alone")),
        *(("twice", 1, "alone"), ("once", 0, "beside a fresh one"), ("delta", 0, "alone")),
        *(("delta", 1, "after a fresh one"), ("ddp", 0, "alone")),
    ],
    tuple(KINDS),
    (0, 1, 2),
    ("alone", "beside a fresh one", "after a fresh one"),
)
def test_a_loss_from_before_is_not_sent_backward_inside(
    run: Run, kind: str, toy: int, how: str
) -> None:
    toys: list[dict[str, Any]] = [{}, {"checkpointing": True}, {"checkpointing": True}]
    toys[2]["reentrant"] = True
    if kind.startswith("ddp") and how != "alone":
        pytest.skip("DDP takes one backward pass for each forward pass")
    run(KINDS[kind][0], collected, _refuse_stale_losses, kind, toys[toy], how)


def _wait(mine: Training) -> None:
    """A micro-batch's gradients that wait for the last one's."""
    with mine.waiting(is_last=False):
        mine.called(*mine.batch(70)).backward()


def _misuse(kind: str) -> None:
    for misuse in ("waiting on entry", "waiting on exit", "gathered", "scales", "scalers", "one"):
        mine, undisturbed = _begin(kind, TOY)
        before = mine.found()
        if misuse == "waiting on entry":
            _wait(mine)
            _refuse(lambda mine=mine: mine.second(1))
            mine.run_pass(1)  # reduces them
            _wait(undisturbed)
            undisturbed.run_pass(1)
            for each in (mine, undisturbed):
                each.optimizer.zero_grad()
                each.run_pass(1)
            before = mine.found()
        elif misuse == "waiting on exit":

            def wait_inside(mine: Training = mine) -> None:
                with mine.optimizer.second_pass():
                    mine.run_pass(1)
                    _wait(mine)

            _refuse(wait_inside, match="not reduced")
        elif misuse == "gathered":
            mine.model.set_reshard_after_backward(False)
            _refuse(lambda mine=mine: mine.second(1))
            mine.model.set_reshard_after_backward(True)
        elif misuse == "scales":
            mine.scale = 1.0 + dist.get_rank()
            _refuse(lambda mine=mine: mine.second(1))
        elif misuse == "scalers":
            mine.scale = torch.amp.GradScaler("cpu", init_scale=2.0 ** dist.get_rank())
            mine.scale.scale(torch.zeros(1))
            _refuse(lambda mine=mine: mine.second(1))
        else:
            mine.scale = math.nan if dist.get_rank() == 1 else None
            _refuse(lambda mine=mine: mine.second(1), (ValueError, RuntimeError))
        mine.scale = None
        _unchanged(mine, before)
        _end_alike(mine, undisturbed, misuse)


@selection("kind", [("once",)], SHARDED)
def test_what_stands_against_a_second_pass_is_refused_by_all_ranks(run: Run, kind: str) -> None:
    run(KINDS[kind][0], _misuse, kind)


def _lack(kind: str, where: str) -> None:
    """No first pass, or no second pass."""
    mine, undisturbed = _training(kind, TOY), _training(kind, TOY)
    if where == "second":
        for each in (mine, undisturbed):
            each.run_pass(1)
    before = mine.found()
    _refuse(mine.optimizer.step if where == "second" else lambda: mine.second(1))
    _unchanged(mine, before)
    for each in (mine, undisturbed):
        each.optimizer.zero_grad()
        each.run_pass(1)
    _end_alike(mine, undisturbed)


@selection(
    "kind, where",
    [("fsdp", "second"), ("twice", "first")],
    tuple(KINDS),
    ("first", "second"),
)
def test_a_pass_that_is_missing_is_missed_by_every_rank(run: Run, kind: str, where: str) -> None:
    run(KINDS[kind][0], collected, _lack, kind, where)


# --- what is raised inside -----------------------------------------------------------------------


def _cut_short(kind: str, case: str, where: str, error: type[BaseException]) -> None:
    mine, undisturbed = _begin(kind, CASES[case], num_micro=2)
    before, hooks = mine.found(), []

    def fail(*_: object) -> None:
        raise error("on purpose")

    def on_forward(_: object, __: object, output: Tensor) -> None:
        output.register_hook(fail)

    if where == "forward":
        hooks.append(mine.model.norm.register_forward_pre_hook(fail))
    if where == "backward":
        hooks.append(mine.model.blocks[0].register_forward_hook(on_forward))

    def fail_inside() -> None:
        with mine.optimizer.second_pass():
            if where == "between":
                _wait(mine)
                fail()
            mine.run_pass(1)
            fail()

    with pytest.raises(error, match="on purpose"):
        fail_inside()
    for hook in hooks:
        hook.remove()
    _unchanged(mine, before)
    with pytest.raises(RuntimeError):
        mine.optimizer.step()
    _end_alike(mine, undisturbed)


@selection(
    "kind, where, error",
    [
        *(("fsdp", "forward", LookupError), ("fsdp", "between", KeyboardInterrupt)),
        *(("once", "between", LookupError), ("twice", "backward", KeyboardInterrupt)),
        *(("delta", "forward", LookupError), ("ddp", "end", LookupError)),
    ],
    tuple(KINDS),
    ("forward", "backward", "between", "end"),
    (LookupError, KeyboardInterrupt),
)
def test_an_exception_inside_leaves_all_as_on_entry(
    run: Run, kind: str, where: str, error: type[BaseException]
) -> None:
    if kind.startswith("ddp") and where != "end":
        pytest.skip("DDP itself cannot go on")
    run(KINDS[kind][0], collected, _cut_short, kind, "clipped CrAM", where, error)


def _cut_short_on_one_rank(kind: str) -> None:
    mine, _ = _begin(kind, TOY)
    before = mine.found()
    try:
        with mine.optimizer.second_pass():
            mine.run_pass(1)
            if dist.get_rank() == 1:
                raise LookupError
    except LookupError:
        _unchanged(mine, before)
        _refuse(lambda: mine.second(1))
    else:
        _refuse(mine.optimizer.step)
    assert mine.found()["weights"] == before["weights"]
    assert mine.found()["moments"] == before["moments"]


@selection("kind", [("once",)], SHARDED)
def test_no_rank_steps_where_another_gave_up(run: Run, kind: str) -> None:
    run(KINDS[kind][0], collected, _cut_short_on_one_rank, kind)


# --- what it leaves alone ------------------------------------------------------------------------


def _drop(kind: str) -> list[str]:
    mine = _training(kind, TOY, "scaler")
    mine.take(0)
    mine.run_pass(1)
    with contextlib.suppress(LookupError), mine.optimizer.second_pass(scale=mine.scaler):
        mine.run_pass(1)
        raise LookupError
    mine.second(1)
    watched = {
        "model": weakref.ref(mine.model),
        "optimizer": weakref.ref(mine.optimizer),
        "base": weakref.ref(mine.base),
        "parameter": weakref.ref(next(mine.model.parameters())),
    }
    del mine
    gc.collect()
    return [name for name, each in watched.items() if each() is not None]


@selection("kind", [("delta",)], tuple(KINDS))
def test_nothing_holds_a_model_that_was_dropped(run: Run, kind: str) -> None:
    assert not any(run(KINDS[kind][0], _drop, kind))
