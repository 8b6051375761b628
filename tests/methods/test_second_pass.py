"""What CrAM's and SAM's second pass leaves behind: nothing. Buffers, and gradients of parameters
that another optimizer trains, are those of the pass at the model's own weights."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsdp
from qsdp.optim import SAM, CrAM
from tests.methods.test_optimizer_references import (
    MASKED,
    METHODS,
    TWO_PASSES,
    all_bits,
    bits,
    closure_of,
)
from tests.support.cram_reference import top_k_masks
from tests_distributed.support.helpers import Toy, make_batch, make_model

WIDTH = 6
NUM_CLASSES = 3

of_two_passes = pytest.mark.parametrize("method", TWO_PASSES)


class Layer(nn.Module):
    """A linear layer and a buffer of every kind, each of which a pass changes."""

    count: Tensor
    kept: Tensor
    assigned: Tensor
    alternating: Tensor
    late: Tensor | None
    fleeting: Tensor | None
    turned: Tensor
    widened: Tensor | None
    shared: Tensor

    def __init__(self, shared: Tensor, has_widened: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("kept", torch.zeros(WIDTH))
        self.register_buffer("assigned", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("alternating", torch.zeros(WIDTH))
        self.register_buffer("late", None)
        self.register_buffer("fleeting", None)
        self.register_buffer("turned", torch.zeros(2, WIDTH).t())
        self.register_buffer("widened", torch.zeros(1).expand(WIDTH) if has_widened else None)
        self.register_buffer("shared", shared)

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC = self.linear(x_BC)
        with torch.no_grad():
            mean_C = y_BC.mean(0)
            self.count += 1
            self.kept.mul_(0.5).add_(mean_C)
            self.assigned = 0.5 * self.assigned + mean_C
            self.turned[:, 1] += mean_C
            self.shared += mean_C
            if self.widened is not None:
                self.widened = (self.widened[0] + mean_C.sum()).expand(WIDTH)
            self.late = mean_C if self.late is None else self.late + mean_C
            if self.count % 2:
                self.alternating += mean_C
                self.fleeting = None
            else:
                self.alternating = self.alternating + 2 * mean_C
                self.fleeting = mean_C
        return x_BC + torch.relu(self.norm(y_BC))


class Net(nn.Module):
    """Two such layers, which share a buffer, and a head."""

    def __init__(self, has_widened: bool) -> None:
        super().__init__()
        shared = torch.zeros(WIDTH)
        self.blocks = nn.ModuleList(Layer(shared, has_widened) for _ in range(2))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x_BC: Tensor, targets_B: Tensor) -> Tensor:
        for block in self.blocks:
            x_BC = block(x_BC)
        return F.cross_entropy(self.head(x_BC), targets_B)


def make_net(has_widened: bool = True) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(has_widened)


def net_batch(seed: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x_BC = torch.randn(5, WIDTH, generator=generator)
    return x_BC, torch.randint(NUM_CLASSES, (5,), generator=generator)


def net_closure(called: Callable[..., Tensor], step: int, rank: int = 0) -> Callable[[], float]:
    def closure() -> float:
        loss = called(*net_batch(step, rank))
        loss.backward()
        return loss.item()

    return closure


def buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Those that are None and those that modules share included."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
    }


def split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained matrices of the blocks, and what else is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {n: p for n, p in trained.items() if n.startswith("blocks.") and p.ndim == 2}
    return hidden, {n: p for n, p in trained.items() if n not in hidden}


def made(method: str, model: nn.Module, base: torch.optim.Optimizer) -> Any:
    """An optimizer that may warn of what its base lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[method](model, base)


def local(tensor: Any) -> Any:
    """This rank's part of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def grads(parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    return all_bits({name: local(p.grad) for name, p in parameters.items()})


def everything(model: nn.Module, base: torch.optim.Optimizer) -> dict[str, Any]:
    """Bits of weights, gradients, buffers and moments (this rank's)."""
    parameters = dict(model.named_parameters())
    return {
        "weights": all_bits({name: local(p) for name, p in parameters.items()}),
        "gradients": grads(parameters),
        "buffers": all_bits(buffers(model)),
        "moments": [
            (key, bits(local(value)))
            for p in parameters.values()
            for key, value in base.state.get(p, {}).items()
            if isinstance(value, Tensor)
        ],
    }


# --- buffers ------------------------------------------------------------------------------------


@of_two_passes
def test_buffers_are_those_of_one_pass_at_the_models_own_weights(method: str) -> None:
    net = make_net()
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(3):
        twin, before = copy.deepcopy(net), buffers(net)
        seen: list[dict[str, Tensor | None]] = []
        one_pass = net_closure(net, step)

        def closure(one_pass: Callable[[], float] = one_pass, seen: list[Any] = seen) -> float:
            loss = one_pass()
            seen.append(buffers(net))
            return loss

        assert optimizer.step(closure) == net_closure(twin, step)()
        assert len(seen) == 2
        after, expected = buffers(net), buffers(twin)
        assert all_bits(after) == all_bits(expected)
        for name, buffer in after.items():
            if buffer is not None:
                assert buffer.stride() == expected[name].stride(), name  # type: ignore[union-attr]
            if seen[0][name] is before[name]:
                assert buffer is before[name], name
        assert after["blocks.0.shared"] is after["blocks.1.shared"]
        assert int(after["blocks.0.count"]) == int(after["blocks.0.norm.num_batches_tracked"])  # type: ignore[arg-type]
        assert int(after["blocks.0.count"]) == step + 1  # type: ignore[arg-type]


class Spread(nn.Module):
    """All values of its buffer are one in memory, which a pass changes in place."""

    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.zeros(1).expand(WIDTH))

    def forward(self, x_BC: Tensor) -> Tensor:
        with torch.no_grad():
            self.spread[0] += x_BC.sum()
        return x_BC


@of_two_passes
def test_a_buffer_whose_values_share_memory_is_no_exception(method: str) -> None:
    net = make_net()
    net.blocks.append(Spread())
    twin, before = copy.deepcopy(net), net.blocks[2].spread
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step(net_closure(net, 0))
    net_closure(twin, 0)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))
    assert net.blocks[2].spread is before
    assert before.stride() == (0,)  # type: ignore[operator]


@of_two_passes
def test_micro_batches_count_once_too(method: str) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))

    def closure_of_three(called: nn.Module) -> Callable[[], None]:
        def closure() -> None:
            for micro in range(3):
                net_closure(called, micro)()

        return closure

    optimizer.step(closure_of_three(net))
    closure_of_three(twin)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))


@of_two_passes
def test_the_buffers_of_a_wrapped_model_are_its_own(method: str) -> None:
    net = make_net()
    twin, holder = copy.deepcopy(net), nn.Sequential(net)
    optimizer = METHODS[method](holder, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step(net_closure(net, 0))
    net_closure(twin, 0)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))


# --- another optimizer's gradients --------------------------------------------------------------

TOYS: list[dict[str, Any]] = [{}, {"tied": True, "frozen": True, "unused": True}]


@of_two_passes
@pytest.mark.parametrize("toy", TOYS, ids=str)
@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("make_base", [torch.optim.SGD, torch.optim.Muon])
def test_another_optimizer_finds_the_gradient_of_the_first_pass(
    method: str, toy: dict[str, Any], was_there: bool, make_base: Any
) -> None:
    model, twin = make_model(1, **toy), make_model(1, **toy)
    hidden, rest = split(model)
    optimizer = made(method, model, make_base(hidden.values(), lr=0.1))
    for parameters in (rest, split(twin)[1]):
        for parameter in parameters.values():
            if was_there:
                parameter.grad = 0.1 * parameter.detach()
    optimizer.step(closure_of(model, model, 0))
    closure_of(twin, twin, 0)()
    assert grads(rest) == grads(split(twin)[1])
    assert all(parameter.grad is None for parameter in hidden.values())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


@of_two_passes
def test_another_optimizers_gradients_add_up_over_steps(method: str) -> None:
    """As it steps once in two steps; with micro-batches in the closure."""
    model, twin = make_model(1), make_model(1)
    hidden, rest = split(model)
    optimizer = made(method, model, torch.optim.SGD(hidden.values(), lr=0.0))

    def closure_of_two(toy: Toy, step: int) -> Callable[[], None]:
        def closure() -> None:
            for micro in range(2):
                closure_of(toy, toy, 2 * step + micro)()

        return closure

    for step in range(2):
        optimizer.step(closure_of_two(model, step))
        closure_of_two(twin, step)()
    assert grads(rest) == grads(split(twin)[1])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_two_passes_warn_of_what_the_base_lacks(method: str, toy: dict[str, Any]) -> None:
    model = make_model(1, **toy)
    hidden, rest = split(model)
    everyone = {**hidden, **rest}
    for parameters, num_lacking in (hidden, len(rest)), (everyone, 0):
        base = torch.optim.SGD(parameters.values(), lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = METHODS[method](model, base)
            for step in range(2):
                model.zero_grad()
                optimizer.step(closure_of(model, model, step))
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        if method in MASKED or num_lacking == 0:
            assert not texts
        else:
            (text,) = texts
            assert re.search(rf"\b{num_lacking}\b", text)
            assert "embed.weight" in text
            assert "\n" not in text


def test_the_first_that_the_base_lacks_is_named() -> None:
    model = make_model(1)
    kept = [p for name, p in model.named_parameters() if name != "blocks.1.mlp.gain"]
    with pytest.warns(UserWarning, match=r"\b1\b.*'?blocks\.1\.mlp\.gain"):
        METHODS["CrAM+"](model, torch.optim.SGD(kept, lr=0.1))


# --- steps that were skipped or cut short --------------------------------------------------------


class Steps:
    """Of a model of which one optimizer trains the matrices and another the rest."""

    method: str
    model: Any
    rest: dict[str, nn.Parameter]
    optimizer: Any
    other: torch.optim.Optimizer
    losses: list[float]

    def run_pass(self, step: int, num_micro: int | None = None) -> float:
        """Forward and backward; returns the loss."""
        raise NotImplementedError

    def prepare(self, step: int) -> None:
        """What is there when a step begins: gradients of an earlier micro-batch."""
        if self.method in MASKED:
            self.run_pass(100 + step, 1)
        else:
            for parameter in self.rest.values():
                parameter.grad = 0.1 * parameter.detach()

    def take(self, step: int, fault: Callable[[int, str], Any] = lambda _, __: None) -> None:
        """Take a step, which calls ``fault`` with the number of the pass and the place. What it
        returns at the end of a pass takes the loss's place."""
        count = 0

        def on_forward(_: Any, __: Any) -> None:
            fault(count, "forward")

        def on_backward(_: Any, __: Any, output: Tensor) -> None:
            output.register_hook(lambda _: fault(count, "backward"))

        def closure() -> float:
            nonlocal count
            count += 1
            loss = self.run_pass(step)
            other = fault(count, "end")
            return loss if other is None else other

        handles = [
            self.model.blocks[1].register_forward_pre_hook(on_forward),
            self.model.blocks[0].register_forward_hook(on_backward),
        ]
        try:
            self.losses.append(self.optimizer.step(closure))
        finally:
            for handle in handles:
                handle.remove()

    def end(self) -> None:
        """The other optimizer's part of a step."""
        self.other.step()
        self.model.zero_grad()


class Job(Steps):
    """Those of a net in one process."""

    def __init__(self, method: str) -> None:
        self.model = make_net()
        self.method = method
        hidden, self.rest = split(self.model)
        self.hidden = list(hidden.values())
        self.base = torch.optim.AdamW(self.hidden, lr=1e-2, foreach=True)
        self.optimizer = made(method, self.model, self.base)
        self.other = torch.optim.SGD(self.rest.values(), lr=0.1, momentum=0.9)
        self.losses = []

    def run_pass(self, step: int, num_micro: int | None = None) -> float:
        return net_closure(self.model, step)()


def failing(in_pass: int, where: str) -> Callable[[int, str], None]:
    def fault(count: int, place: str) -> None:
        if (count, place) == (in_pass, where):
            raise LookupError("on purpose")

    return fault


@pytest.mark.parametrize(
    ("method", "in_pass"),
    [*((method, n) for method in TWO_PASSES for n in (1, 2)), *((method, 1) for method in MASKED)],
)
@pytest.mark.parametrize("bad_step", [0, 1])
@pytest.mark.parametrize(("what", "bad"), [("gradient", math.nan), ("loss", math.inf)])
def test_a_skipped_step_leaves_all_as_before_it(
    method: str, in_pass: int, bad_step: int, bad: float, what: str
) -> None:
    job = Job(method)
    for step in range(bad_step):
        job.prepare(step)
        job.take(step)
        job.end()
    job.prepare(bad_step)
    before = everything(job.model, job.base)

    def spoil(count: int, place: str) -> float | None:
        if (count, place) != (in_pass, "end"):
            return None
        if what == "gradient":
            grad = job.hidden[0].grad  # of which the second pass drops a part
            assert grad is not None
            grad.fill_(bad)
            return None
        return bad

    job.take(bad_step, spoil)
    after = everything(job.model, job.base)
    if method in MASKED:  # whose masks change all the same
        before, after = ({n: each[n] for n in ("gradients", "buffers")} for each in (before, after))
    assert after == before
    assert job.optimizer.skipped_steps == 1
    named = "the loss" if what == "loss" else "the gradient of blocks.0.linear.weight"
    assert job.optimizer.last_bad.startswith(named)
    assert ("second" in job.optimizer.last_bad) == (in_pass == 2)
    before = everything(job.model, job.base)
    job.take(bad_step)
    assert job.optimizer.skipped_steps == 1
    assert job.optimizer.last_bad is None
    assert everything(job.model, job.base)["weights"] != before["weights"]


@pytest.mark.parametrize(
    ("method", "in_pass"),
    [*((method, n) for method in TWO_PASSES for n in (1, 2)), *((method, 1) for method in MASKED)],
)
@pytest.mark.parametrize("where", ["forward", "backward", "end"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_step_that_was_cut_short_leaves_no_trace(
    method: str, in_pass: int, where: str, bad_step: int
) -> None:
    job, undisturbed = Job(method), Job(method)
    for step in range(4):
        for each in (job, undisturbed):
            each.prepare(step)
        if step == bad_step:
            before = everything(job.model, job.base)
            with pytest.raises(LookupError):
                job.take(step, failing(in_pass, where))
            assert everything(job.model, job.base) == before
        for each in (job, undisturbed):
            each.take(step)
        assert everything(job.model, job.base) == everything(undisturbed.model, undisturbed.base)
        for each in (job, undisturbed):
            each.end()
    assert job.losses == undisturbed.losses
    assert job.optimizer.num_steps == 4


# --- two optimizers, against what they do written plainly ----------------------------------------

RHO, LR, OTHER_LR, SPARSITY = 0.05, 0.1, 0.05, 0.6
NUM_STEPS = 3
PAIRS: dict[str, dict[str, Any]] = {
    "CrAM+": {"plus": True, "prunes": True, "normalize": False},
    "CrAM": {"plus": False, "prunes": True, "normalize": False},
    "SAM": {"plus": False, "prunes": False, "normalize": True},
}


def train_plainly(
    model: Toy, ranks: Sequence[int], *, plus: bool, prunes: bool, normalize: bool
) -> None:
    """CrAM or SAM over the blocks' matrices, SGD over the rest."""
    hidden, rest = (list(part.values()) for part in split(model))
    matrices = {
        n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2
    }
    prunable = list(matrices.values())  # frozen ones, too

    def gradients(step: int) -> tuple[list[Tensor], list[Tensor]]:
        losses = [model(*make_batch(model, step, rank)) for rank in ranks]
        found = torch.autograd.grad(sum(losses) / len(ranks), [*hidden, *rest])
        return list(found[: len(hidden)]), list(found[len(hidden) :])

    for step in range(NUM_STEPS):
        first, others = gradients(step)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in first))
        before = [p.detach().clone() for p in [*hidden, *prunable]]
        with torch.no_grad():
            for parameter, grad in zip(hidden, first, strict=True):
                parameter.add_(RHO * grad / (norm if normalize else 1))
            total = sum(p.numel() for p in prunable)
            num_keep = total - round(SPARSITY * total) if prunes else total
            masks = dict(
                zip(prunable, top_k_masks([p.detach() for p in prunable], num_keep), strict=True)
            )
            for parameter, mask in masks.items():
                parameter.mul_(mask)
        second, _ = gradients(step)
        with torch.no_grad():
            for parameter, value in zip([*hidden, *prunable], before, strict=True):
                parameter.copy_(value)
            for parameter, one, two in zip(hidden, first, second, strict=True):
                parameter.sub_(LR * (two * masks[parameter] + (one if plus else 0)))
            for parameter, grad in zip(rest, others, strict=True):
                parameter.sub_(OTHER_LR * grad)


def train_with_two(
    method: str, model: nn.Module, closures: Callable[[int], Callable[[], Any]]
) -> None:
    """As `train_plainly`, by two optimizers."""
    hidden, rest = split(model)
    base = torch.optim.SGD(hidden.values(), lr=LR, foreach=True)
    other = torch.optim.SGD(rest.values(), lr=OTHER_LR, foreach=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "SAM":
            optimizer: CrAM = SAM(model, base, rho=RHO)
        else:
            plus = PAIRS[method]["plus"]
            optimizer = CrAM(model, base, sparsity=SPARSITY, rho=RHO, plus=plus)
    for step in range(NUM_STEPS):
        optimizer.step(closures(step))
        other.step()
        other.zero_grad()


@of_two_passes
@pytest.mark.parametrize("tied", [False, True])
def test_two_optimizers_train_as_written_plainly(method: str, tied: bool) -> None:
    model, plain = make_model(1, tied=tied), make_model(1, tied=tied)
    train_with_two(method, model, lambda step: closure_of(model, model, step))
    train_plainly(plain, [0], **PAIRS[method])
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_a_model_compressed_for_a_while_has_its_own_buffers_again() -> None:
    net = make_net()
    before = all_bits(buffers(net))
    with qsdp.compressed(net, 0.5):
        net_closure(net, 0)()
        assert all_bits(buffers(net)) != before
    assert all_bits(buffers(net)) == before


class Growing(nn.Module):
    """Its buffer has more values after each pass."""

    seen: Tensor

    def __init__(self, data: bool) -> None:
        super().__init__()
        self.data = data
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x_BC: Tensor) -> Tensor:
        grown = torch.cat([self.seen, x_BC.detach().mean().view(1)])
        if self.data:
            self.seen.data = grown
        else:
            self.seen.resize_(len(grown)).copy_(grown)
        return x_BC


@of_two_passes
@pytest.mark.parametrize("data", [False, True])
def test_a_buffer_that_grows_has_grown_once(method: str, data: bool) -> None:
    net = make_net()
    net.blocks.append(Growing(data))
    twin = copy.deepcopy(net)
    optimizer = METHODS[method](net, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step(net_closure(net, 0))
    net_closure(twin, 0)()
    assert all_bits(buffers(net)) == all_bits(buffers(twin))
