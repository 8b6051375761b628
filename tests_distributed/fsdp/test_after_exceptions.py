"""After an exception, or a pass in another mode, the next step equals that of a run without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import qsdp
from tests_distributed.conftest import Run, selection
from tests_distributed.support.helpers import (
    Toy,
    all_ranks,
    full_grads,
    full_state,
    make_batch,
    make_model,
    shard,
)

NUM_STEPS = 4
LEARNED = qsdp.QSDPConfig(weight_bits=4, grad_bits=4, levels="learned", level_steps=(1, 3), seed=3)
BUDGET = qsdp.QSDPConfig(budget=5.0, warmup_steps=1)
TWO_PASSES = ("CrAM", "CrAM+", "SAM")

Between = Callable[[Tensor], Any]


class Fault(Exception):
    """What a user's code raises."""


class RaisesBackward(torch.autograd.Function):
    """Copies, and raises in the backward pass."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        raise Fault


def fail(*_: Any) -> Any:
    raise Fault


@dataclass(frozen=True)
class Setting:
    """How a toy is trained."""

    method: str
    gather: str | None
    """None: without the wire."""
    reshard: bool | None = None
    num_micro: int = 1


class Job:
    """One run on every rank."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = shard(make_model(frozen=True), nested=False, reshard=setting.reshard)
        self.handle: qsdp.Handle | None = None
        if setting.gather is not None:
            config = replace(LEARNED if setting.num_micro == 1 else BUDGET, gather=setting.gather)
            self.handle = qsdp.install(self.model, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.base = torch.optim.AdamW(trained, lr=1e-2, foreach=True)
        self.optimizer = _optimizer(setting.method, self.model, self.base)
        self.losses: list[float] = []

    def take(
        self, step: int, fault: Callable[[], AbstractContextManager[Between | None]] = nullcontext
    ) -> None:
        """Take a step, with every forward pass inside a ``fault``, which may change the loss."""

        def closure() -> float:
            self.optimizer.zero_grad()
            total = 0.0
            for micro in range(self.setting.num_micro):
                is_last = micro == self.setting.num_micro - 1
                self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
                with fault() as between:
                    loss = self.model(*make_batch(self.model, 10 * step + micro))
                    loss = loss if between is None else between(loss)
                torch.autograd.backward(loss)
                total += loss.item()
            return total

        if self.setting.method == "AdamW":
            loss = closure()
            self.optimizer.step()
        else:
            loss = self.optimizer.step(closure)
        self.losses.append(loss)

    def state(self) -> list[Any]:
        """All that training has left on this rank."""
        moments = [v for state in self.base.state.values() for v in state.values()]
        tensors = [*self.model.parameters(), *(v for v in moments if isinstance(v, Tensor))]
        wire = None if self.handle is None else self.handle.state_dict()
        return [[_bytes(tensor) for tensor in tensors], self.losses, wire]


def _bytes(tensor: Tensor) -> bytes:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def _optimizer(method: str, model: nn.Module, base: torch.optim.Optimizer) -> Any:
    if method == "AdamW":
        return base
    if method == "SAM":
        return qsdp.SAM(model, base)
    if method == "ACDC":
        schedule = qsdp.ACDCSchedule(steps=4, warmup=1, phase=1, last_dense=1, last_sparse=1)
        return qsdp.ACDC(model, base, schedule=schedule, target=0.5)
    if method == "GMP":
        schedule = qsdp.GMPSchedule(steps=4, start=1, end=3, every=1, initial=0.2, sparsity=0.6)
        return qsdp.GMP(model, base, schedule=schedule)
    return qsdp.CrAM(model, base, plus=method == "CrAM+", sparsity=(0.3, 0.6))


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
            with _hooked(job.model, where):
                yield None

    hook = job.base.register_step_pre_hook(fail) if where == "optimizer" else None
    with pytest.raises(Fault):
        job.take(step, nullcontext if where == "optimizer" else fault)
    if hook is not None:
        hook.remove()
    job.optimizer.zero_grad()
    if job.handle is not None and job.setting.num_micro > 1:
        job.handle.abandon_step()


@contextmanager
def _hooked(model: Toy, where: str) -> Iterator[None]:
    """Inside, a forward pass of ``model`` raises in its middle, or its backward pass will."""
    in_backward = where == "backward"
    hook = model.blocks[not in_backward].register_forward_hook(
        (lambda *args: RaisesBackward.apply(args[2])) if in_backward else fail
    )
    try:
        yield
    finally:
        hook.remove()


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
        _hooked(job.model, "forward") if fails else nullcontext(),
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
    """How many points there are, and those after which training was not the same; of every
    twentieth point, if they are a ``part``."""
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
    for gather in ("twice", "once", None)
    if (method, gather) != ("AdamW", None)
}


@selection(
    ("way", "reshard", "num_micro", "part"),
    [
        ("AdamW-twice", None, 1, 0),
        ("AdamW-once", None, 2, 3),
        ("CrAM+-once", None, 1, 5),
        ("CrAM-twice", False, 2, 6),
        ("ACDC-twice", False, 1, 1),
        ("GMP-once", None, 2, 9),
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
        masks = [_bytes(mask) for mask in job.optimizer.masks().values()]
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
            with pytest.raises(Fault), _hooked(job.model, "backward"):
                torch.autograd.backward(job.model(*make_batch(job.model, 9)))
            assert job.handle._wire.late, "no reduce was under way"
        job.base.zero_grad(set_to_none=False)
        torch.autograd.backward(job.model(*make_batch(job.model, step)))
        job.base.step()
    return [job.state()[0]]


def both(function: Callable[[bool], Any]) -> bool:
    return bool(function(False) == function(True))


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


# --- what only looks like a pass that was cut short ----------------------------------------------


class Recursive(nn.Module):
    """Two blocks, passed through several times by a module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor, times: int = 0) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        x = self.head(x)
        return self(x, times - 1) if times else x

    def direct_step(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        loss: Tensor = self.head(x).square().mean()
        return loss

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).square().mean()  # type: ignore[no-any-return]


def _recursive(gather: str | None, config: qsdp.QSDPConfig | None = None) -> Recursive:
    model = Recursive()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=all_ranks())
    for method in ("training_step", "direct_step"):
        register_fsdp_forward_method(model, method)
    if gather is not None:
        config = config or qsdp.QSDPConfig(weight_bits=32, grad_bits=32)
        qsdp.install(model, replace(config, gather=gather))
    return model


def _input(seed: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def calls_inside_a_pass(gather: str | None) -> list[list[Tensor]]:
    """Gradients of micro-batches through a registered method and an evaluation between them, and
    of a root that calls itself, where torch can do that (2.11 cannot)."""
    model = _recursive(gather)
    for micro in range(3):
        model.set_requires_gradient_sync(micro == 2)  # type: ignore[operator]
        torch.autograd.backward(model.training_step(_input(micro)))
        with torch.no_grad():
            model(_input(9))
    model.reshard()  # type: ignore[operator]
    found = [list(full_grads(model).values())]
    model.zero_grad()
    if hasattr(model, "reset_iter_state"):
        torch.autograd.backward(model(_input(3), 2).square().mean())
        found.append(list(full_grads(model).values()))
    return found


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_a_root_may_be_called_inside_its_own_pass(run: Run, gather: str) -> None:
    for stock, ours in zip(
        run(2, calls_inside_a_pass, None), run(2, calls_inside_a_pass, gather), strict=True
    ):
        torch.testing.assert_close(ours, stock)


def edit_after_a_direct_call() -> float:
    """A frozen head is set to zero after a block was called by itself."""
    model = _recursive(None).requires_grad_(False)
    model.blocks[0].requires_grad_(True)
    qsdp.install(model, qsdp.QSDPConfig(gather="once"))
    torch.autograd.backward(model(_input(0)).sum())
    with torch.no_grad():
        model.blocks[0](_input(1))
        for parameter in model.head.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().zero_()
        return float(model(_input(2)).abs().sum())


def test_an_edit_after_a_direct_call_of_a_block_is_seen(run: Run) -> None:
    assert run(2, edit_after_a_direct_call) == [0.0, 0.0]


def steps_of_other_optimizers() -> float:
    """One rank trains something of its own between two forward passes."""
    model = _recursive("twice")
    first = model(_input(0))
    if dist.get_rank() == 0:
        own = nn.Linear(2, 2)
        own(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(own.parameters()).step()
    torch.autograd.backward((first + model(_input(1))).sum())
    return sum(float(grad.sum()) for grad in full_grads(model).values())


def test_a_rank_may_train_something_of_its_own(run: Run) -> None:
    first, second = run(2, steps_of_other_optimizers)
    assert first == second


def registered_after_a_failed_evaluation(fails: bool) -> list[float]:
    """Steps of a registered method, of which no hook hears, and an evaluation before levels are
    learned."""
    model = _recursive("twice", LEARNED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        if step == 1:
            with pytest.raises(Fault) if fails else nullcontext(), torch.no_grad():
                hook = model.blocks[1].register_forward_hook(fail) if fails else None
                try:
                    model(_input(9))
                finally:
                    if hook is not None:
                        hook.remove()
        optimizer.zero_grad()
        loss = model.direct_step(_input(step))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_failed_evaluation_is_over_for_registered_methods_too(run: Run) -> None:
    assert run(2, both, registered_after_a_failed_evaluation) == [True, True]
