"""After an exception, or a pass in another mode, the next step equals that of a run without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import qsdp
from tests_distributed.support.helpers import Toy, full_state, make_batch, make_model, shard
from tests_distributed.support.interruptions import (
    NUM_STEPS,
    Between,
    Fault,
    Job,
    RaisesBackward,
    Setting,
    both,
    bytes_of,
    fail,
    hooked,
)
from tests_distributed.support.running import Run, selection

TWO_PASSES = ("CrAM", "CrAM+", "SAM")


# --- points in a step: it raises there, and is then taken again ---------------------------------

IN_A_STEP = ("before", "forward", "loss", "start of backward", "backward", "optimizer")


def raise_in_step(job: Job, where: str, step: int, in_pass: int) -> None:
    """Begin ``step``, which raises in its forward pass number ``in_pass``, the first being 1."""
    count = 0

    @contextmanager
    def fault() -> Iterator[Between | None]:
        nonlocal count
        count += 1
        if count != in_pass:
            yield None
        elif where == "before":
            fail()
        elif where == "loss":
            yield fail
        elif where == "start of backward":
            yield RaisesBackward.apply
        else:
            with hooked(job.model, where):
                yield None

    hook = job.base.register_step_pre_hook(fail) if where == "optimizer" else None
    with pytest.raises(Fault):
        job.take(step, nullcontext if where == "optimizer" else fault)
    if hook is not None:
        hook.remove()
    job.optimizer.zero_grad()
    if job.handle is not None and job.setting.num_micro > 1:
        job.handle.abandon_step()


# --- passes between two steps, which raise in the middle or do not ------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


BETWEEN: dict[str, Callable[[Job], AbstractContextManager[Any]]] = {
    "without gradients": lambda _: torch.no_grad(),
    "inference": lambda _: torch.inference_mode(),
    "evaluation": lambda job: _evaluating(job.model),
    "no backward pass": lambda _: nullcontext(),
    "exact": lambda job: job.handle.exact() if job.handle else nullcontext(),
    "aside": lambda job: job.handle.aside() if job.handle else nullcontext(),
    "measuring": lambda job: job.handle.measuring() if job.handle else nullcontext(),
    "compressed": lambda job: qsdp.compressed(job.model, 0.5),
    "compressed evaluation": lambda job: _compressed_evaluation(job.model),
}


@contextmanager
def _compressed_evaluation(model: nn.Module) -> Iterator[None]:
    with qsdp.compressed(model, 0.5), _evaluating(model):
        yield


def pass_between(job: Job, where: str, *, fails: bool) -> None:
    """A forward pass in another mode, whose exception is caught where it is left."""
    with (
        pytest.raises(Fault) if fails else nullcontext(),
        BETWEEN[where](job),
        hooked(job.model, "forward") if fails else nullcontext(),
    ):
        job.model(*make_batch(job.model, 99))


def gathers_ahead(job: Job, *_: Any) -> None:
    """All groups are being gathered when somebody asks for exact, then for compressed weights."""
    for context in ("exact", "compressed"):
        for module in (*job.model.blocks, job.model):
            module.unshard(async_op=True)  # type: ignore[operator]
        pass_between(job, context, fails=False)
    for module in (*job.model.blocks, job.model):
        module.unshard(async_op=True)  # type: ignore[operator]


# --- the matrix ---------------------------------------------------------------------------------

Disturb = Callable[[Job], None]


def points(setting: Setting) -> dict[str, tuple[int, Disturb]]:
    """By name: the step before which something happens, and what."""
    found: dict[str, tuple[int, Disturb]] = {}
    last = setting.num_micro * (2 if setting.method in TWO_PASSES else 1)
    for step in (0, 2, 3):
        for where in IN_A_STEP:
            if where == "optimizer" and setting.method == "AdamW":
                continue  # nobody undoes the pass that it had: see the next test
            for in_pass in dict.fromkeys([1, last] if where != "optimizer" else [1]):
                found[f"{where}, pass {in_pass} of step {step}"] = (
                    step,
                    lambda job, where=where, step=step, in_pass=in_pass: raise_in_step(
                        job, where, step, in_pass
                    ),
                )
        for where in BETWEEN:
            if where == "inference" and setting.gather is None and not step:
                continue  # torch's own FSDP2 cannot train after such a first pass
            for fails in (False, True):
                found[f"{where}{' fails' * fails}, before step {step}"] = (
                    step,
                    lambda job, where=where, fails=fails: pass_between(job, where, fails=fails),
                )
        found[f"gathers ahead, before step {step}"] = (step, gathers_ahead)
    return found


def train(setting: Setting, at: int = -1, disturb: Disturb = lambda _: None) -> list[Any]:
    """What a run leaves in which ``disturb`` comes before step ``at``."""
    job = Job(setting)
    for step in range(NUM_STEPS):
        if step == at:
            disturb(job)
        job.take(step)
    return job.state()


def differing(setting: Setting, part: int | None) -> tuple[int, list[str]]:
    """How many points there are, and those after which training was not the same.

    Only every twentieth point is taken, if they are a ``part``.
    """
    undisturbed = train(setting)
    every = list(points(setting).items())[part :: 1 if part is None else 20]
    found = []
    for name, (step, disturb) in every:
        try:
            if train(setting, step, disturb) != undisturbed:
                found.append(name)
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return len(every), found


METHODS = ("AdamW", "CrAM", "CrAM+", "SAM", "ACDC", "GMP")
# Without a wire (None) AdamW's recovering is torch's own affair.
WAYS = {
    f"{method}-{gather}": (method, gather)
    for method in METHODS
    for gather in ("twice", "once", "delta", None)
    if (method, gather) != ("AdamW", None)
}


@selection(
    ("way", "reshard", "num_micro", "part"),
    [
        ("AdamW-twice", None, 1, 0),
        ("AdamW-once", None, 2, 3),
        ("AdamW-delta", False, 2, 7),
        ("CrAM+-delta", None, 1, 10),
        ("ACDC-delta", None, 2, 12),
        ("GMP-twice", False, 2, 9),
        ("SAM-None", None, 1, 0),
    ],
    WAYS,
    (None, False),
    (1, 2),
    range(20),
)
def test_the_next_step_is_that_of_a_run_without(
    run: Run, way: str, reshard: bool | None, num_micro: int, part: int
) -> None:
    for count, found in run(2, differing, Setting(*WAYS[way], reshard, num_micro), part):
        assert not found, f"{len(found)} of {count} points"


# --- what the matrix does not reach --------------------------------------------------------------


def prunes_though_told_not_to(method: str) -> list[bool]:
    """A callback that raises just before the masks change: the step counts as taken."""

    def run(fails: bool) -> list[Any]:
        job = Job(Setting(method, "once"))
        for step in range(NUM_STEPS):
            job.optimizer.before_pruning = fail if fails else None
            before = job.optimizer.num_steps
            try:
                job.take(step)
            except Fault:
                assert job.optimizer.num_steps == before + 1
                job.optimizer.zero_grad()
        masks = [bytes_of(mask) for mask in job.optimizer.masks().values()]
        return [job.state()[0], masks]

    return [each == other for each, other in zip(run(False), run(True), strict=True)]


@pytest.mark.parametrize("method", ["ACDC", "GMP"])
def test_masks_are_renewed_when_a_callback_fails(run: Run, method: str) -> None:
    for same in run(2, prunes_though_told_not_to, method):
        assert same == [True, True]


def gradients_set_to_zero(cut_short: bool) -> list[list[bytes]]:
    """Gradients that are zeroed in place after a backward pass whose reduces were under way."""
    job = Job(Setting("AdamW", "once"))
    assert job.handle is not None
    for step in range(2):
        if cut_short and step == 0:
            with pytest.raises(Fault), hooked(job.model, "backward"):
                torch.autograd.backward(job.model(*make_batch(job.model, 9)))
            assert job.handle._wire.late, "no reduce was under way"
        job.base.zero_grad(set_to_none=False)
        torch.autograd.backward(job.model(*make_batch(job.model, step)))
        job.base.step()
    return [job.state()[0]]


def test_what_a_reduce_under_way_brings_after_its_pass_was_cut_short_is_dropped(run: Run) -> None:
    assert run(2, both, gradients_set_to_zero) == [True, True]


def weights_after(mode: str) -> float:
    """How far the parameters that a model shows after an evaluation are from its weights."""
    model = shard(make_model(), nested=False, reshard=None)
    exact = full_state(model)
    qsdp.install(model, qsdp.QSDPConfig(weight_bits=2, embedding_bits=2))
    with torch.inference_mode() if mode == "inference" else torch.no_grad():
        model(*make_batch(model, 0))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    shown = full_state(model)
    return max(float((shown[name] - exact[name]).abs().max()) for name in exact)


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_a_model_shows_its_own_weights_after_an_evaluation(run: Run, mode: str) -> None:
    assert run(2, weights_after, mode) == [0.0, 0.0]


def stale_root() -> bool:
    """A forward pass whose backward pass is left out, and an optimizer's step after it."""
    job = Job(Setting("AdamW", "twice"))
    job.take(0)
    torch.autograd.backward(job.model(*make_batch(job.model, 1)))
    job.model(*make_batch(job.model, 2))  # its root stays gathered
    job.base.step()
    loss = job.model(*make_batch(job.model, 3))
    _reshard(job.model)
    return bool(loss == job.model(*make_batch(job.model, 3)))


def _reshard(model: Toy) -> None:
    for module in (*model.blocks, model):
        module.reshard()  # type: ignore[operator]


def test_no_pass_is_made_with_weights_of_an_earlier_step(run: Run) -> None:
    assert run(2, stale_root) == [True, True]


# --- a root that has no parameters of its own ----------------------------------------------------


def _cut_short_under_a_bare_root(where: str | None) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)))
    for part in model:
        fully_shard(part)
    fully_shard(model)
    qsdp.install(model, qsdp.QSDPConfig(weight_bits=4, grad_bits=4, bucket_size=64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        if where is not None and step == 1:
            with pytest.raises(Fault), hooked(SimpleNamespace(blocks=model), where):
                model(batch).square().mean().backward()
            optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return [losses, full_state(model)]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_of_a_root_without_parameters_is_taken_again(run: Run, where: str) -> None:
    expected = run(2, _cut_short_under_a_bare_root, None)
    for (losses, state), (plain, whole) in zip(
        run(2, _cut_short_under_a_bare_root, where), expected, strict=True
    ):
        assert losses == plain
        torch.testing.assert_close(state, whole, rtol=0, atol=0)
