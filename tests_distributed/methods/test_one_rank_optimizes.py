"""One rank differs in an optimizer, a step, or what is clipped and compressed.

All ranks raise one sentence, and none hangs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import qsdp
from tests_distributed.support.helpers import make_model, shard
from tests_distributed.support.one_rank import (
    FORWARD,
    SUPPORT,
    UP,
    Act,
    Point,
    Says,
    Stage,
    apart,
    assert_said,
    differs,
    forward,
    made,
    mistaken,
    say_at_each,
    train,
)
from tests_distributed.support.running import Run, selection


def _argument(name: str, argument: str, there: Any, elsewhere: Any, **common: Any) -> Point:
    """That argument of the constructor is another one."""
    one, other = (re.escape(repr(value)) for value in (there, elsewhere))
    return Point(
        there=made(name, **common | {argument: there}),
        elsewhere=made(name, **common | {argument: elsewhere}),
        says=differs(f"qsdp.{name}", argument, one, other),
        config=None,
    )


def _bad(name: str, argument: str, there: Any, mistake: str, **common: Any) -> Point:
    """That argument is one that cannot be."""
    return Point(
        there=made(name, **common | {argument: there}),
        elsewhere=made(name, **common),
        says=mistaken(f"qsdp.{name}", mistake),
        config=None,
    )


def _base(name: str, there: Mapping[str, Any], one: str, **common: Any) -> Point:
    """The base optimizer is another one."""
    return Point(
        there=made(name, **{**common, **there}),
        elsewhere=made(name, **common),
        says=differs(f"qsdp.{name}", "base_optimizer", one, "AdamW .*'lr': 0.1.*"),
        config=None,
    )


def _lacking(stage: Stage) -> None:
    """A base optimizer that has a norm less than the others'."""
    parameters = [p for name, p in stage.model.named_parameters() if name != "norm.weight"]
    qsdp.CrAM(stage.model, torch.optim.AdamW(parameters, lr=0.1))


def _frozen_and_made(name: str, **options: Any) -> Act:
    def act(stage: Stage) -> None:
        stage.parameter(UP).requires_grad_(False)
        made(name, **options)(stage)

    return act


PHASES = qsdp.ACDCSchedule(steps=8, warmup=1, phase=2, last_dense=1, last_sparse=1)
OTHER_PHASES = qsdp.ACDCSchedule(steps=8, warmup=2, phase=2, last_dense=1, last_sparse=1)
GROWTH = qsdp.GMPSchedule(steps=9, sparsity=0.5, initial=0.1, start=1, every=1, end=5)
OTHER_GROWTH = qsdp.GMPSchedule(steps=9, sparsity=0.6, initial=0.1, start=1, every=1, end=5)
MLP = ["*.mlp.*.weight"]
OPTIONS: dict[str, dict[str, Any]] = {
    "CrAM": {},
    "SAM": {},
    "ACDC": {"schedule": PHASES},
    "GMP": {"schedule": GROWTH},
}

OPTIMIZERS = {
    "sparsity of CrAM": _argument("CrAM", "sparsity", 0.3, [0.5, 0.7]),
    "rho of CrAM": _argument("CrAM", "rho", 0.1, 0.05),
    "plus": _argument("CrAM", "plus", False, True),
    "normalize": _argument("CrAM", "normalize", True, False),
    "sparse_grad": _argument("CrAM", "sparse_grad", False, True),
    "max_norm of CrAM": _argument("CrAM", "max_norm", 1.0, None),
    "prunable of CrAM": _argument("CrAM", "prunable", MLP, None),
    "seed of CrAM": _argument("CrAM", "seed", 3, 0),
    "rho of SAM": _argument("SAM", "rho", 0.1, 0.05),
    "max_norm of SAM": _argument("SAM", "max_norm", 1.0, None),
    "schedule of ACDC": _argument("ACDC", "schedule", OTHER_PHASES, PHASES),
    "steps of ACDC": _argument("ACDC", "schedule", 40, PHASES),
    "target of ACDC": _argument("ACDC", "target", "2:4", 0.9, schedule=PHASES, prunable=MLP[:0]),
    "max_norm of ACDC": _argument("ACDC", "max_norm", 2.0, 1.0, schedule=PHASES),
    "prunable of ACDC": _argument("ACDC", "prunable", MLP, None, schedule=PHASES),
    "schedule of GMP": _argument("GMP", "schedule", OTHER_GROWTH, GROWTH),
    "scope of GMP": _argument("GMP", "scope", "layer", "global", schedule=GROWTH),
    "max_norm of GMP": _argument("GMP", "max_norm", 2.0, None, schedule=GROWTH),
    "prunable of GMP": _argument("GMP", "prunable", MLP, None, schedule=GROWTH),
    "bad sparsity": _bad("CrAM", "sparsity", 1.5, "sparsity is 1.5: choose .*"),
    "no sparsity": _bad("CrAM", "sparsity", (), "sparsity is empty: .*"),
    "bad rho": _bad("CrAM", "rho", -1.0, "rho is -1.0: choose .*"),
    "bad rho of SAM": _bad("SAM", "rho", float("nan"), "rho is nan: choose .*"),
    "bad max_norm of SAM": _bad("SAM", "max_norm", 0, "max_norm is 0: choose .*"),
    "bad pattern": _bad("CrAM", "prunable", ["no.such"], "the prunable pattern 'no.such' .*"),
    "bad schedule of ACDC": _bad(
        "ACDC", "schedule", "often", "the schedule is .*", schedule=PHASES
    ),
    "bad target of ACDC": _bad(
        "ACDC", "target", "4bit", "the target 4bit has bits, but .*", schedule=PHASES
    ),
    "bad schedule of GMP": _bad("GMP", "schedule", 9, "the schedule is 9: .*", schedule=GROWTH),
    "bad scope of GMP": _bad("GMP", "scope", "row", "scope is 'row': .*", schedule=GROWTH),
    "bad max_norm of GMP": _bad("GMP", "max_norm", -1, "max_norm is -1: .*", schedule=GROWTH),
    "lr": _base("CrAM", {"lr": 0.2}, "AdamW .*'lr': 0.2.*"),
    "base of SAM": _base("SAM", {"base": torch.optim.SGD}, "SGD .*"),
    "base of ACDC": _base("ACDC", {"base": torch.optim.SGD}, "SGD .*", schedule=PHASES),
    "lr of GMP": _base("GMP", {"lr": 0.2}, "AdamW .*'lr': 0.2.*", schedule=GROWTH),
    "bad base": _bad("CrAM", "base", torch.optim.LBFGS, "the base optimizer is LBFGS: .*"),
    "a parameter less": Point(
        there=_lacking,
        elsewhere=made("CrAM"),
        says=differs("qsdp.CrAM", "parameters of the optimizer", r"\d+", r"\d+"),
        config=None,
    ),
    "a frozen parameter": Point(
        there=_frozen_and_made("ACDC", schedule=PHASES),
        elsewhere=made("ACDC", schedule=PHASES),
        says=differs("qsdp.ACDC", "prunable parameters", r"\d others", UP),
        config=None,
    ),
    "another class": Point(
        there=made("SAM"),
        elsewhere=made("CrAM"),
        says=apart("qsdp.SAM", "qsdp.CrAM"),
        config=None,
    ),
    "not made": Point(there=forward, elsewhere=made("CrAM"), says=apart(FORWARD, "qsdp.CrAM")),
}


def _step(stage: Stage) -> None:
    """A step with a closure."""
    stage.optimizer.step(stage.train)


def _step_alone(stage: Stage) -> None:
    stage.optimizer.step()


def _numbered(key: str) -> Act:
    """Load a state of another step, and step."""

    def act(stage: Stage) -> None:
        state = stage.optimizer.state_dict()
        for group in state["param_groups"]:
            group[key] = 3
        stage.optimizer.load_state_dict(state)
        _step(stage)

    return act


def _frozen_and_step(stage: Stage) -> None:
    stage.parameter("norm.weight").requires_grad_(False)
    _step(stage)


def _kept_and_step(stage: Stage) -> None:
    stage.model.set_reshard_after_backward(False)
    _step(stage)


def _closure_fails(stage: Stage) -> None:
    """The closure fails before its first pass, and the step is tried again."""

    def fails() -> None:
        raise ZeroDivisionError

    try:
        stage.optimizer.step(fails)
    except ZeroDivisionError:
        _step(stage)


def _steps(name: str) -> dict[str, Point]:
    """Of each class."""
    call = f"{name}.step"
    key = "masked_step" if name in ("ACDC", "GMP") else "cram_step"

    def before(stage: Stage) -> None:
        made(name, **OPTIONS[name])(stage)
        _step(stage)

    def point(there: Act, elsewhere: Act, says: Says) -> Point:
        return Point(before=before, there=there, elsewhere=elsewhere, says=says)

    return {
        f"closure of {name}": point(_step_alone, _step, differs(call, "closure", "False", "True")),
        f"step of {name}": point(_numbered(key), _step, differs(call, "step", "3", "1")),
        f"frozen under {name}": point(
            _frozen_and_step, _step, differs(call, "trained parameters", r"\d+", r"\d+")
        ),
        f"kept under {name}": point(
            _kept_and_step, _step, mistaken(call, f"{name} edits the weights .*")
        ),
        f"no step of {name}": point(train, _step, apart(FORWARD, call)),
        f"a step more of {name}": point(_step, train, apart(call, FORWARD)),
        f"a failure in a step of {name}": point(_closure_fails, _step, apart(call, FORWARD)),
    }


def _with_support(stage: Stage) -> None:
    stage.optimizer.share_support(stage.handle.set_support)
    _step(stage)
    stage.forward()


def _at_another_target(stage: Stage) -> None:
    stage.optimizer.targets = (qsdp.Compression(pattern=(1, 5)),)
    _step(stage)


def _step_and_forward(stage: Stage) -> None:
    _step(stage)
    stage.forward()


def _at_rate(lr: float) -> Act:
    def act(stage: Stage) -> None:
        stage.train()
        for group in stage.optimizer.param_groups:
            group["lr"] = lr
        stage.optimizer.step()
        stage.forward()

    return act


def _with_state_of_its_own(stage: Stage) -> None:
    for parameter in stage.optimizer.parameters():
        stage.optimizer.state[parameter]["of its own"] = 1
    _step(stage)


STEPS = {
    **_steps("CrAM"),
    **_steps("SAM"),
    **_steps("ACDC"),
    **_steps("GMP"),
    "target of CrAM": Point(
        before=made("CrAM", sparsity=0.5),
        there=_at_another_target,
        elsewhere=_step,
        says=differs("CrAM.step", "target", "1:5", "0.5"),
    ),
    "support of CrAM": Point(
        before=made("CrAM"),
        there=_with_support,
        elsewhere=_step_and_forward,
        says=apart(SUPPORT, FORWARD),
    ),
    "support of ACDC": Point(
        before=made("ACDC", schedule=PHASES),
        there=_with_support,
        elsewhere=_step_and_forward,
        says=apart(SUPPORT, FORWARD),
    ),
    "state of ACDC": Point(
        before=made("ACDC", schedule=PHASES),
        there=_with_state_of_its_own,
        elsewhere=_step,
        says=differs("ACDC.step", "state", "True", "False"),
    ),
    "a learning rate of 0": Point(
        before=made("GMP", schedule=GROWTH),
        there=_at_rate(0.0),
        elsewhere=_at_rate(0.1),
        says=differs("GMP.step", "learning rates of 0", "True", "False"),
    ),
}

# --- clipping, compression --------------------------------------------------------------------

CLIP, COMPRESSED = "qsdp.clip_grad_norm_", "qsdp.compressed"


def _clip(max_norm: float) -> Act:
    return lambda stage: qsdp.clip_grad_norm_(stage.model.parameters(), max_norm)


def _clip_fewer(stage: Stage) -> None:
    qsdp.clip_grad_norm_([stage.parameter(UP)], 1.0)


def _clip_nothing(stage: Stage) -> None:
    qsdp.clip_grad_norm_([], 1.0)
    stage.forward()


def _frozen_and_clip(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    _clip(1.0)(stage)


def _compressed(*args: Any, part: bool = False, **kwargs: Any) -> Act:
    def act(stage: Stage) -> None:
        model = stage.model.blocks[0] if part else stage.model
        with qsdp.compressed(model, *args, **kwargs), torch.no_grad():
            stage.forward()

    return act


WHOLE = {
    "max_norm": Point(
        before=train,
        there=_clip(2.0),
        elsewhere=_clip(1.0),
        says=differs(CLIP, "max_norm", "2.0", "1.0"),
    ),
    "bad max_norm": Point(
        before=train,
        there=_clip(-1.0),
        elsewhere=_clip(1.0),
        says=mistaken(CLIP, "max_norm is -1.0: choose a number above 0"),
    ),
    "fewer parameters": Point(
        before=train,
        there=_clip_fewer,
        elsewhere=_clip(1.0),
        says=differs(CLIP, "trained parameters", "1", r"\d+"),
    ),
    "no parameters": Point(
        before=train,
        there=_clip_nothing,
        elsewhere=_clip(1.0),
        says=apart(FORWARD, CLIP),
    ),
    "a parameter that is frozen": Point(
        before=train,
        there=_frozen_and_clip,
        elsewhere=_clip(1.0),
        says=differs(CLIP, "trained parameters", r"\d+", r"\d+"),
    ),
    "not clipped": Point(
        before=train, there=forward, elsewhere=_clip(1.0), says=apart(FORWARD, CLIP)
    ),
    "target": Point(
        there=_compressed(0.5),
        elsewhere=_compressed("0.5+layer"),
        says=differs(COMPRESSED, "target", "0.5", r"0.5\+layer"),
    ),
    "patterns": Point(
        there=_compressed(0.5, MLP),
        elsewhere=_compressed(0.5),
        says=differs(COMPRESSED, "prunable parameters", r"\d others", ".*qkv.*"),
    ),
    "bad target": Point(
        there=_compressed("many"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "the target 'many' has the term 'many': .*"),
    ),
    "bad patterns": Point(
        there=_compressed(0.5, "*"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "the prunable patterns are the text .*"),
    ),
    "a method that there is not": Point(
        there=_compressed(0.5, method="none"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "method is 'none': choose one of magnitude.*"),
    ),
    "a target that does not fit": Point(
        there=_compressed("0.5+block3"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "blocks.* cut into groups of 3: .*"),
    ),
    "not compressed": Point(
        there=forward, elsewhere=_compressed(0.5), says=apart(FORWARD, COMPRESSED)
    ),
    "compressed without the wire": Point(
        there=_compressed(0.5),
        elsewhere=_clip(1.0),
        says=apart(COMPRESSED, CLIP),
        config=None,
    ),
}


TABLES = {"optimizers": OPTIMIZERS, "steps": STEPS, "whole": WHOLE}


def go_through(table: str, odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    return say_at_each(TABLES[table], odd)


@pytest.mark.parametrize("table", TABLES)
@selection("ranks,odd", [(3, -1)], [2, 3], [0, -1])
def test_when_one_rank_differs_all_raise_and_say_how(
    run: Run, table: str, ranks: int, odd: int
) -> None:
    assert_said(TABLES[table], run(ranks, go_through, table, odd), odd)


def _without_gradients(odd: int) -> dict[str, Any]:
    """Norms where one rank has no gradient at all, and the number of its steps."""
    odd %= dist.get_world_size()
    found: dict[str, Any] = {}
    for name in OPTIONS:
        stage = Stage(STEPS[f"step of {name}"], dist.get_rank(), odd)
        made(name, **OPTIONS[name])(stage)

        def closure(stage: Stage = stage) -> Tensor:
            loss = stage.train()
            if stage.rank == odd:
                stage.optimizer.zero_grad()
            return loss

        for _ in range(2):
            stage.optimizer.step(closure)
        found[name] = stage.optimizer.last_grad_norm, stage.optimizer.num_steps
        stage.optimizer.zero_grad()
        closure()
        found[f"clipped after {name}"] = qsdp.clip_grad_norm_(stage.model.parameters(), 1.0)
        stage.forward()
    return found


@selection("ranks,odd", [(2, -1), (3, 0)], [2, 3], [0, -1])
def test_a_rank_may_have_no_gradient(run: Run, ranks: int, odd: int) -> None:
    first, *others = run(ranks, _without_gradients, odd)
    assert all(norm and steps == 2 for norm, steps in map(first.get, OPTIONS))
    assert others == [first] * (ranks - 1)


def optimizers_with_objects() -> bool:
    """Two optimizers whose defaults hold what is another object on every rank."""
    model = shard(make_model())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.defaults["hook"] = object()
    return isinstance(qsdp.CrAM(model, base), qsdp.CrAM)


def test_objects_of_each_rank_are_no_difference(run: Run) -> None:
    assert run(2, optimizers_with_objects) == [True, True]
