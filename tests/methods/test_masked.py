"""AC/DC and gradual pruning in one process, against a reference on a plain model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from qsdp.optim import ACDC, GMP, CrAM
from qsdp.optim.masked import MaskedOptimizer
from qsdp.sparsity.prunable import prunable_parameters
from qsdp.sparsity.schedule import ACDCSchedule, GMPSchedule
from tests.support.masked_reference import ReferenceMasked, acdc_phase, cubic
from tests_distributed.support.helpers import make_batch, make_model

STEPS = 24
PHASES = {"warmup": 3, "phase": 4, "last_dense": 3, "last_sparse": 5}
SCHEDULE = ACDCSchedule(steps=STEPS, **PHASES)
GRADUAL = GMPSchedule(steps=STEPS, sparsity=0.9, initial=0.3, start=2, every=5, end=19)
BASES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
SIZES = {"width": 16, "hidden": 8}


def is_compressed(step: int) -> bool:
    return acdc_phase(step, STEPS, *PHASES.values())


def acdc_reference(model: nn.Module, base: Any, keeps: dict[str, Any], **options: Any) -> Any:
    def renewed(done: int) -> dict[str, Any] | None:
        return keeps if is_compressed(done) and not is_compressed(done - 1) else None

    return _reference(model, base, is_compressed, renewed, **options)


def gmp_reference(model: nn.Module, base: Any, keeps: dict[str, Any], **options: Any) -> Any:
    def renewed(done: int) -> dict[str, Any] | None:
        if done not in (2, 7, 12, 17):
            return None
        return {**keeps, "sparsity": cubic((done - 2) / 15, 0.9, 0.3)}

    return _reference(model, base, lambda step: step >= 2, renewed, **options)


def _reference(model: Any, base: Any, *plan: Any, **options: Any) -> ReferenceMasked:
    names = [n for n, p in prunable_parameters(model).items() if p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    dims = [0 if model.config.conv1d else 1] * len(names)
    return ReferenceMasked(model, base(trained), names, *plan, dims, **options)


def backward(model: nn.Module, step: int) -> float:
    model.zero_grad()
    loss = model(*make_batch(model, seed=step, rank=0))
    loss.backward()
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _zeros(optimizer: MaskedOptimizer) -> int:
    """Exact +0.0 among the prunable weights."""
    return sum(int((p.view(torch.int32) == 0).sum()) for p in optimizer.prunable.parameters)


@pytest.mark.parametrize(
    ("base", "target", "keeps"),
    [
        ("sgd", 0.9, {"sparsity": 0.9}),
        ("adamw", "0.5+layer", {"sparsity": 0.5, "layer": True}),
        ("plain sgd", "2:4", {"pattern": (2, 4)}),
        ("adamw", "2:4", {"pattern": (2, 4)}),
        ("adamw", "0.75+block4", {"sparsity": 0.75, "block": 4}),
    ],
    ids=str,
)
def test_acdc_is_the_paper_step_by_step(base: str, target: Any, keeps: dict[str, Any]) -> None:
    options: dict[str, Any] = {**SIZES, "tied": base == "sgd", "conv1d": base == "adamw"}
    model, plain = make_model(seed=1, **options), make_model(seed=1, **options)
    limit = 1.0 if "sgd" in base else None
    optimizer = ACDC(
        model, BASES[base](model.parameters()), schedule=SCHEDULE, target=target, max_norm=limit
    )
    reference = acdc_reference(plain, BASES[base], keeps, max_norm=limit or math.inf)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    pruned = round(total * (0.5 if target == "2:4" else keeps["sparsity"]))
    called = []
    optimizer.before_pruning = lambda: called.append(_zeros(optimizer))
    for step in range(STEPS):
        assert backward(model, step) == pytest.approx(backward(plain, step), abs=1e-5)
        before = {name: mask.clone() for name, mask in optimizer.masks().items()}
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
        masks = optimizer.masks()
        torch.testing.assert_close(masks, reference.masks, rtol=0, atol=0)
        if is_compressed(step) or is_compressed(step + 1):
            assert _zeros(optimizer) == pruned
        if is_compressed(step) and is_compressed(step + 1):
            torch.testing.assert_close(masks, before, rtol=0, atol=0)
        if is_compressed(step) and not is_compressed(step + 1):
            assert all(mask.all() for mask in masks.values())
            for state in optimizer.state.values():
                assert not any(state[m].any() for m in ("exp_avg", "momentum_buffer") if m in state)
        if base == "adamw":
            for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                for moment in ("exp_avg", "exp_avg_sq", "step"):
                    torch.testing.assert_close(
                        optimizer.state[mine][moment], reference.base.state[theirs][moment]
                    )
    entries = sum(is_compressed(s + 1) and not is_compressed(s) for s in range(STEPS))
    assert called == [0] * entries
    assert optimizer.num_steps == STEPS
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("base", "scope"), [("sgd", "global"), ("adamw", "layer")])
def test_gradual_pruning_is_the_cubic_schedule_step_by_step(base: str, scope: str) -> None:
    model, plain = make_model(seed=1), make_model(seed=1)
    optimizer = GMP(model, BASES[base](model.parameters()), schedule=GRADUAL, scope=scope)
    reference = gmp_reference(plain, BASES[base], {"layer": scope == "layer"})
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    for step in range(STEPS):
        backward(model, step)
        backward(plain, step)
        before = optimizer.masks()
        before = {name: mask.clone() for name, mask in before.items()}
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
        masks = optimizer.masks()
        torch.testing.assert_close(masks, reference.masks, rtol=0, atol=0)
        assert all((mask <= before[name]).all() for name, mask in masks.items())
        if step + 1 >= 2 and scope == "global":
            place = min((step + 1 - 2) // 5, 3)
            assert _zeros(optimizer) == round(cubic(place / 3, 0.9, 0.3) * total)


def test_gradual_pruning_keeps_its_support_where_weights_do_not_move() -> None:
    """The output layers begin at zero and a learning rate of 0 leaves them there."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.blocks[0].out.weight.zero_()
        model.blocks[0].qkv.weight[:20].zero_()
    optimizer = GMP(model, torch.optim.SGD(model.parameters(), lr=0.0), schedule=GRADUAL)
    for step in range(STEPS):
        before = {name: mask.clone() for name, mask in optimizer.masks().items()}
        backward(model, step)
        optimizer.step()
        assert all((mask <= before[name]).all() for name, mask in optimizer.masks().items())


@pytest.mark.parametrize(
    ("steps", "options"),
    [(24, PHASES), (10, dict.fromkeys(PHASES, 1)), (7, {**PHASES, "warmup": 0, "last_dense": 0})],
    ids=str,
)
def test_phases_follow_the_formula(steps: int, options: dict[str, int]) -> None:
    schedule = ACDCSchedule.of(steps, **options)
    for step in range(steps + 3):
        assert schedule.is_compressed(step) == acdc_phase(step, steps, *options.values())
    dense = [s for s in range(steps) if not schedule.is_compressed(s)]
    last = [*schedule.last_dense_steps()]
    assert last == (dense[-len(last) :] if dense else [])
    assert not dense or last[0] == 0 or schedule.is_compressed(last[0] - 1)


@pytest.mark.parametrize("steps", [100, 1000, 1600])
def test_phases_have_the_papers_shares_by_default(steps: int) -> None:
    schedule = ACDCSchedule.of(steps)
    shares = [steps // 10, steps // 20, steps // 10, steps * 15 // 100]
    for step in range(steps):
        assert schedule.is_compressed(step) == acdc_phase(step, steps, *shares)


def test_the_cubic_schedule_and_its_cycles() -> None:
    found = {done: GRADUAL.sparsity_after(done) for done in range(STEPS + 1)}
    places = {2: 0, 7: 1 / 3, 12: 2 / 3, 17: 1}
    for done, sparsity in found.items():
        if done in places:
            assert sparsity == pytest.approx(cubic(places[done], 0.9, 0.3), abs=1e-12)
        else:
            assert sparsity is None
    assert [GRADUAL.is_pruned(step) for step in range(4)] == [False, False, True, True]
    begins = [0, 2, 7, 12, 17]
    for step in range(STEPS):
        begin = max(b for b in begins if b <= step)
        end = min([b for b in begins if b > step], default=STEPS)
        assert GRADUAL.cycle(step) == (step - begin, end - begin)


@pytest.mark.parametrize("call", ["acdc", "gmp"])
def test_schedules_that_cannot_be_are_refused(call: str) -> None:
    cases: list[tuple[dict[str, Any], str]]
    if call == "acdc":
        cases = [
            ({"warmup": -1}, "warmup is -1; choose 0"),
            ({"phase": 0}, "phase is 0; choose 1"),
            ({"last_sparse": 0}, "last_sparse is 0; choose 1"),
            ({"warmup": 90}, "take 115 of 100 steps"),
            ({"warmup": 75, "phase": 5}, "phase is 5, but"),
        ]
        made: Any = ACDCSchedule.of
    else:
        cases = [
            ({"sparsity": 1.0}, "from 0.5 to 1.0"),
            ({"sparsity": -0.5}, "from -0.5 to -0.5"),
            ({"sparsity": 0.9, "start": 0}, "from step 0"),
            ({"sparsity": 0.9, "every": 0}, "every 0"),
            ({"sparsity": 0.9, "end": 101}, "to 101"),
            ({"sparsity": 0.9, "start": 9, "end": 9, "every": 5}, "every is 5, but the pruning of"),
            ({"sparsity": 0.9, "start": 9, "end": 12, "initial": 0.1}, "initial is 0.1, but"),
        ]
        made = GMPSchedule.of
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            made(100, **options)


def test_bad_arguments_are_refused_in_a_sentence() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, message in (
        ({"schedule": SCHEDULE, "target": "0.5+4bit"}, "a mask cannot round"),
        ({"schedule": SCHEDULE, "target": "2:4"}, "cannot cut into groups of 4"),
        ({"schedule": SCHEDULE, "max_norm": 0.0}, "max_norm is 0.0"),
        ({"schedule": ACDCSchedule.of(20, warmup=0)}, "AC/DC begins dense"),
        ({"schedule": 20, "prunable": ["nothing"]}, "matches no parameter"),
        ({"schedule": 10.0}, "the schedule is 10.0"),
        ({"schedule": None}, "the schedule is None"),
        ({"schedule": SCHEDULE, "prunable": "*.weight"}, "give a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            ACDC(model, base, **options)
    with pytest.raises(ValueError, match="the schedule is 10"):
        GMP(model, base, schedule=10)  # type: ignore[arg-type]
    double = make_model().double()
    for target in (0.5, "2:4+4bit", "4bit"):
        with pytest.raises(ValueError, match=r"is torch\.float64; only"):
            CrAM(double, torch.optim.SGD(double.parameters()), sparsity=target)
    with pytest.raises(ValueError, match=r"is torch\.float64; only"):
        ACDC(double, torch.optim.SGD(double.parameters()), schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"is torch\.float64; only"):
        GMP(double, torch.optim.SGD(double.parameters()), schedule=GRADUAL)
    with pytest.raises(ValueError, match="scope is 'row'"):
        GMP(model, base, schedule=GRADUAL, scope="row")
    with pytest.raises(ValueError, match="lacks 8 prunable"):
        GMP(make_model(), base, schedule=GRADUAL)


@pytest.mark.parametrize("through_dcp", [False, True])
@pytest.mark.parametrize("method", ["acdc", "gmp"])
def test_a_state_goes_with_its_own_schedule(method: str, through_dcp: bool) -> None:
    def make(changed: bool) -> tuple[Any, Any]:
        model = make_model(seed=3)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if method == "acdc":
            return model, ACDC(model, base, schedule=22 if changed else 20)
        gradual = GMPSchedule.of(22 if changed else 20, 0.9)
        return model, GMP(model, base, schedule=gradual)

    model, optimizer = make(changed=False)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    for changed in (False, True):
        other_model, other = make(changed)
        if through_dcp:
            saved: Any = get_optimizer_state_dict(model, optimizer)

            def load(own: Any = (other_model, other), saved: Any = saved) -> None:
                set_optimizer_state_dict(*own, optim_state_dict=saved)
        else:

            def load(own: Any = other) -> None:
                own.load_state_dict(optimizer.state_dict())

        if changed:
            with pytest.raises(ValueError, match="its masks would not be those of its phases"):
                load()
        else:
            load()
            assert other.num_steps == 4


@pytest.mark.parametrize("patterns", [["blocks.0.*.weight"], ["blocks.*"], "nothing at all"])
@pytest.mark.parametrize("method", ["acdc", "gmp"])
def test_a_state_goes_with_its_own_prunable_set(method: str, patterns: Any) -> None:
    """Else a compressed phase would prune nothing of what has no mask."""

    def make(prunable: Any) -> tuple[Any, MaskedOptimizer]:
        model = make_model(seed=3)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if method == "acdc":
            return model, ACDC(model, base, schedule=SCHEDULE, prunable=prunable)
        return model, GMP(model, base, schedule=GRADUAL, prunable=prunable)

    model, optimizer = make(None)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if patterns == "nothing at all":
        _, other = make(None)
        for each in state["state"].values():
            each.pop("mask", None)
    else:
        _, other = make(patterns)
    mistake = {
        "nothing at all": "the state's 0 masks are of other parameters than the 8",
        "blocks.0.*.weight": r"no mask of blocks\.0\.norm1.* a mask of blocks\.1\.qkv.* that this",
        "blocks.*": r"the state has no mask of blocks\.0\.\S+ \(and \d+ more\);",
    }
    match = mistake[patterns if isinstance(patterns, str) else patterns[0]]
    with pytest.raises(ValueError, match=match) as caught:
        other.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert other.num_steps == 0


@pytest.mark.parametrize("through_dcp", [False, True])
@pytest.mark.parametrize("method", ["acdc", "gmp"])
def test_a_mask_goes_to_the_parameter_of_its_name_or_is_refused(
    method: str, through_dcp: bool
) -> None:
    """torch's own state goes by number, and the blocks' matrices have equal shapes."""

    def make(is_turned: bool) -> tuple[Any, MaskedOptimizer]:
        model = make_model(seed=3)
        first, second = reversed(model.blocks) if is_turned else model.blocks
        parts = [model.embed, model.position, first, second, model.norm, model.head]
        base = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-2)
        if method == "acdc":
            return model, ACDC(model, base, schedule=SCHEDULE)
        return model, GMP(model, base, schedule=GRADUAL)

    model, optimizer = make(is_turned=False)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    masks = {name: mask.clone() for name, mask in optimizer.masks().items()}
    other_model, other = make(is_turned=True)
    if through_dcp:
        saved: Any = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(other_model, other, optim_state_dict=saved)
        for name, mask in other.masks().items():
            assert torch.equal(mask, masks[name])
        assert not all(mask.all() for mask in masks.values())
    else:
        with pytest.raises(ValueError, match=r"places, blocks\.0\.\S+ where .* blocks\.1\."):
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert other.num_steps == 0


@pytest.mark.parametrize(
    ("order", "mistake"),
    [
        ("reversed", r"places, blocks\.0\.qkv\.weight where this ACDC has blocks\.1\.mlp"),
        ("decayed first", "in other places: the base"),
    ],
)
def test_masks_among_parameters_in_another_order_are_refused_for_that(
    order: str, mistake: str
) -> None:
    """Not for another prunable set, which it is not."""

    def make(is_other: bool) -> tuple[Any, MaskedOptimizer]:
        model = make_model(seed=3)
        parameters: Any = list(model.parameters())
        if is_other and order == "reversed":
            parameters.reverse()
        elif is_other:
            groups = [
                [p for p in parameters if (p.dim() > 1) is decays] for decays in (True, False)
            ]
            parameters = [{"params": group} for group in groups]
        return model, ACDC(model, torch.optim.SGD(parameters, lr=1e-2), schedule=SCHEDULE)

    model, optimizer = make(is_other=False)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    _, other = make(is_other=True)
    state["param_groups"] = [
        {**state["param_groups"][0], "params": group["params"]}
        for group in other.state_dict()["param_groups"]
    ]
    with pytest.raises(ValueError, match=mistake + r".*stand in another order; make it as it was"):
        other.load_state_dict(state)
    assert other.num_steps == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 2, 4, 6])
def test_a_gradient_that_is_not_finite_skips_the_step_but_counts_it(
    bad: float, bad_step: int
) -> None:
    """Steps 2 and 6 end a phase: the masks change all the same."""
    model = make_model(seed=2)
    optimizer = ACDC(model, torch.optim.AdamW(model.parameters()), schedule=SCHEDULE, target=0.8)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    for step in range(bad_step):
        backward(model, step)
        optimizer.step()
    before = weights(model)
    moments = copy.deepcopy([state.get("exp_avg_sq") for state in optimizer.state.values()])
    backward(model, bad_step)
    model.norm.bias.grad[3] = bad
    optimizer.step()
    assert (optimizer.num_steps, optimizer.skipped_steps) == (bad_step + 1, 1)
    assert not math.isfinite(optimizer.last_grad_norm or 0)
    assert _zeros(optimizer) == (round(0.8 * total) if bad_step in (2, 4, 6) else 0)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items() if "blocks" not in n)
    now = [state.get("exp_avg_sq") for state in optimizer.state.values()]
    torch.testing.assert_close(now, moments, rtol=0, atol=0)
    assert all(m.dtype == torch.bool for m in optimizer.masks().values())
    assert all(m.all() == (bad_step in (0, 6)) for m in optimizer.masks().values())
    for step in range(bad_step + 1, 9):
        backward(model, step)
        optimizer.step()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("through_dcp", [False, True])
@pytest.mark.parametrize(
    ("base", "method"),
    [("sgd", "acdc"), ("plain sgd", "acdc"), ("adamw", "acdc"), ("adamw", "gmp")],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    base: str, method: str, through_dcp: bool
) -> None:
    """Interrupted within a compressed phase; the learning rate begins at 0."""

    def make(seed: int) -> tuple[Any, Any, Any]:
        model = make_model(seed=seed, frozen=True, tied=True, unused=True)
        made = BASES[base](model.parameters() if through_dcp else _trained(model))
        if method == "acdc":
            optimizer: Any = ACDC(model, made, schedule=SCHEDULE, target=0.8)
        else:
            optimizer = GMP(model, made, schedule=GRADUAL)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 4))
        return model, optimizer, schedule

    def train(run: tuple[Any, Any, Any], steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(backward(run[0], step))
            run[1].step()
            run[2].step()
        return losses

    run, again = make(4), make(5)
    assert run[1].param_groups[0]["lr"] == 0.0
    train(run, range(5))
    saved = copy.deepcopy(
        (
            run[0].state_dict(),
            get_optimizer_state_dict(run[0], run[1]) if through_dcp else run[1].state_dict(),
            run[2].state_dict(),
        )
    )
    masks = copy.deepcopy(run[1].masks())
    losses = train(run, range(5, 22))
    again[0].load_state_dict(saved[0])
    if through_dcp:
        set_optimizer_state_dict(again[0], again[1], saved[1])
    else:
        again[1].load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    assert again[1].num_steps == 5
    torch.testing.assert_close(again[1].masks(), masks, rtol=0, atol=0)
    assert not all(m.all() for m in masks.values())
    assert again[1].base.state is again[1].state
    assert train(again, range(5, 22)) == losses
    torch.testing.assert_close(weights(again[0]), weights(run[0]), rtol=0, atol=0)
    torch.testing.assert_close(again[1].masks(), run[1].masks(), rtol=0, atol=0)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_a_state_dict_of_a_fresh_optimizer_changes_nothing() -> None:
    for base in BASES.values():
        model = make_model()
        optimizer = ACDC(model, base(model.parameters()), schedule=SCHEDULE)
        before = weights(model)
        state = get_optimizer_state_dict(model, optimizer)
        torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
        assert optimizer.num_steps == optimizer.skipped_steps == 0
        assert state["state"]["blocks.0.qkv.weight"]["mask"].dtype == torch.bool


def test_a_bare_base_optimizers_state_can_be_loaded() -> None:
    model = make_model()
    base = torch.optim.AdamW(model.parameters())
    backward(model, 0)
    base.step()
    optimizer = ACDC(model, torch.optim.AdamW(model.parameters()), schedule=SCHEDULE)
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.num_steps == 0
    assert all(mask.all() for mask in optimizer.masks().values())
    for step in range(4):
        backward(model, step)
        optimizer.step()
    assert not any(mask.all() for mask in optimizer.masks().values())


def test_frozen_weights_are_neither_pruned_nor_counted() -> None:
    model = make_model(frozen=True)
    frozen = model.blocks[0].out.weight.detach().clone()
    optimizer = ACDC(model, torch.optim.SGD(_trained(model), lr=0.1), schedule=SCHEDULE)
    total = sum(p.numel() for p in optimizer.prunable.parameters)
    assert "blocks.0.out.weight" not in optimizer.masks()
    for step in range(4):
        backward(model, step)
        optimizer.step()
    assert torch.equal(model.blocks[0].out.weight, frozen)
    assert _zeros(optimizer) == round(0.9 * total)


@pytest.mark.parametrize("late", ["all skipped", "unused at first"])
def test_a_first_gradient_may_come_after_the_mask(late: str) -> None:
    model = make_model(unused=True)
    optimizer = ACDC(model, torch.optim.AdamW(model.parameters(), lr=1e-2), schedule=SCHEDULE)
    for step in range(6):
        backward(model, step)
        if late == "all skipped" and step < 4:
            model.norm.bias.grad[0] = math.nan
        if late == "unused at first" and step > 4:
            model.blocks[0].unused.weight.grad = torch.ones_like(model.blocks[0].unused.weight)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
    unused = model.blocks[0].unused.weight
    mask = optimizer.masks()["blocks.0.unused.weight"]
    assert not unused[~mask].any()
    assert ("exp_avg" in optimizer.state[unused]) == (late == "unused at first")


def test_a_closure_gives_the_loss() -> None:
    model = make_model()
    optimizer = ACDC(model, torch.optim.SGD(model.parameters(), lr=0.1), schedule=SCHEDULE)
    assert optimizer.step(lambda: backward(model, 0)) > 0
    assert optimizer.num_steps == 1


@pytest.mark.parametrize("is_kept", [False, True], ids=["gone", "kept"])
def test_who_wraps_a_base_last_says_what_its_states_are_of(is_kept: bool) -> None:
    def wrapped() -> ACDC:
        return ACDC(model, base, schedule=SCHEDULE, target=0.5)

    model = make_model()
    base = torch.optim.AdamW(model.parameters())
    earlier = GMP(model, base, schedule=GRADUAL) if is_kept else None
    ACDC(model, base, schedule=SCHEDULE, target=0.9)
    optimizer = wrapped()
    for step in range(4):
        backward(model, step)
        optimizer.step()
    saved, masks = copy.deepcopy(optimizer.state_dict()), optimizer.masks()
    optimizer.load_state_dict(saved)
    base = torch.optim.AdamW(model.parameters())
    again = wrapped()
    again.load_state_dict(saved)
    torch.testing.assert_close(again.masks(), masks, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.masks(), masks, rtol=0, atol=0)
    assert earlier is None or not earlier._loaded_masks
    with pytest.raises(ValueError, match="the state was made under"):
        ACDC(model, base, schedule=SCHEDULE, target=0.9).load_state_dict(saved)
