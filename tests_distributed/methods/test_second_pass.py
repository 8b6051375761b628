"""Under FSDP2 and DDP too, CrAM's and SAM's second pass leaves nothing behind.

It is so with the quantized wire and without: see tests/methods/test_second_pass.py for one process.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import qsdp
from tests.support.optimizers import MASKED, METHODS, TWO_PASSES, all_bits
from tests.support.second_pass import (
    PAIRS,
    Steps,
    buffers,
    everything,
    failing,
    grads,
    local,
    made,
    make_net,
    net_batch,
    split,
    train_plainly,
    train_with_two,
)
from tests_distributed.support.helpers import (
    collected,
    found_by_one,
    full_state,
    make_batch,
    make_model,
    shard,
    wire_config,
)
from tests_distributed.support.running import Run, selection

KINDS = ("fsdp", "fsdp, 8 bits", "ddp", "ddp, views of buckets")


def _parallel(kind: str, module: Any) -> Any:
    """What to call."""
    if kind.startswith("ddp"):
        return DistributedDataParallel(module, gradient_as_bucket_view="views" in kind)
    shard(module, nested=False)
    if "bits" in kind:
        num_bits = int(kind.split()[1])
        config = wire_config(16, weight_bits=num_bits, grad_bits=num_bits)
        qsdp.install(module, config)
    return module


@dataclass
class Job(Steps):
    """Those of a model on all ranks."""

    kind: str
    method: str
    model: Any
    batch: Callable[[int], Any]
    num_micro: int = 1

    def __post_init__(self) -> None:
        self.called = _parallel(self.kind, self.model)
        hidden, self.rest = split(self.model)
        self.hidden: list[Any] = list(hidden.values())
        self.base = torch.optim.AdamW(self.hidden, lr=1e-2, foreach=True)
        self.optimizer = made(self.method, self.called, self.base)
        self.other = torch.optim.SGD(self.rest.values(), lr=0.1, momentum=0.9, foreach=True)
        self.losses = []

    @classmethod
    def of_net(cls, kind: str, method: str, num_micro: int = 1) -> Job:
        net = make_net(has_widened=not kind.startswith("ddp"))  # which DDP could not send
        return cls(kind, method, net, lambda seed: net_batch(seed, dist.get_rank()), num_micro)

    @classmethod
    def of_toy(cls, kind: str, method: str, **options: Any) -> Job:
        toy = make_model(1, num_layers=1, **options)
        return cls(kind, method, toy, lambda seed: make_batch(toy, seed))

    def run_pass(self, step: int, num_micro: int | None = None) -> float:
        num_micro = self.num_micro if num_micro is None else num_micro
        total = 0.0
        for micro in range(num_micro):
            if isinstance(self.called, FSDPModule):
                self.called.set_requires_gradient_sync(micro == num_micro - 1)
            loss: Tensor = self.called(*self.batch(10 * step + micro)) / num_micro
            loss.backward()
            total += loss.item()
        return total

    def everything(self) -> dict[str, Any]:
        return everything(self.model, self.base)


# --- buffers ------------------------------------------------------------------------------------


def _compare_buffers(kind: str, method: str, num_micro: int) -> None:
    job, twin = Job.of_net(kind, method, num_micro), Job.of_net(kind, method, num_micro)
    before, seen = buffers(job.model), []

    def closure() -> float:
        loss = job.run_pass(0)
        seen.append(buffers(job.model))
        return loss

    assert job.optimizer.step(closure) == twin.run_pass(0)
    assert len(seen) == 2
    after, expected = buffers(job.model), buffers(twin.model)
    assert all_bits(after) == all_bits(expected)
    for name, buffer in after.items():
        if seen[0][name] is before[name]:
            assert buffer is before[name], name
    assert after["blocks.0.shared"] is after["blocks.1.shared"]
    assert job.model.blocks[0].norm.num_batches_tracked.item() == num_micro
    assert grads(job.rest) == grads(twin.rest)


@selection(
    "kind, method",
    [
        *(("fsdp", "SAM"), ("fsdp, 8 bits", "CrAM+")),
        *(("ddp", "SAM"), ("ddp, views of buckets", "CrAM+")),
    ],
    KINDS,
    TWO_PASSES,
)
def test_buffers_are_those_of_one_pass_at_the_models_own_weights(
    run: Run, kind: str, method: str
) -> None:
    run(2, collected, _compare_buffers, kind, method, 2 if kind == "fsdp" else 1)


def _count_batches(kind: str, method: str) -> list[int]:
    job = Job.of_net(kind, method)
    for step in range(3):
        job.take(step)
        job.end()
    return [int(job.model.blocks[i].norm.num_batches_tracked) for i in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_batch_counts_once(run: Run, kind: str) -> None:
    assert run(2, collected, _count_batches, kind, "CrAM+") == [[3, 3], [3, 3]]


# --- another optimizer's gradients --------------------------------------------------------------


def _compare_others(kind: str, method: str, options: dict[str, Any], was_there: bool) -> None:
    job, twin = (Job.of_toy(kind, method, **options) for _ in range(2))
    if was_there:
        for each in (job, twin):
            for parameter in each.rest.values():
                parameter.grad = 0.1 * parameter.detach()
    job.optimizer.step(lambda: job.run_pass(0))
    twin.run_pass(0)
    if was_there and kind.startswith("ddp"):  # it averages what was there, too
        for parameter, expected in zip(job.rest.values(), twin.rest.values(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad)
    else:
        assert grads(job.rest) == grads(twin.rest)
    assert all(parameter.grad is None for parameter in job.hidden)


@selection(
    "kind, method, was_there",
    [
        *(("fsdp", "CrAM+", True), ("fsdp", "CrAM", False)),
        *(("fsdp, 8 bits", "SAM", True), ("ddp", "CrAM+", True)),
        *(("ddp, views of buckets", "CrAM", True), ("ddp, views of buckets", "SAM", False)),
    ],
    KINDS,
    TWO_PASSES,
    [False, True],
)
def test_another_optimizer_finds_the_gradient_of_the_first_pass(
    run: Run, kind: str, method: str, was_there: bool
) -> None:
    run(2, collected, _compare_others, kind, method, {"tied": method != "CrAM"}, was_there)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp, 8 bits"])
def test_frozen_unused_and_tied_parameters_are_no_exception(run: Run, kind: str) -> None:
    options = {"frozen": True, "unused": True, "tied": True}
    run(3, collected, _compare_others, kind, "CrAM+", options, True)


def _warnings(kind: str) -> dict[str, list[str]]:
    found = {}
    for method in METHODS:
        toy = make_model(1, num_layers=1)
        called = _parallel(kind, toy)
        hidden, rest = split(toy)
        for what, parameters in ("hidden", hidden), ("all", {**hidden, **rest}):
            base = torch.optim.SGD(parameters.values(), lr=0.1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                METHODS[method](called, base)
            texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
            found[f"{method}, {what}"] = texts
    return found


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_passes_warn_of_what_the_base_lacks(run: Run, kind: str) -> None:
    num_lacking = len(split(make_model(1, num_layers=1))[1])
    for rank, found in enumerate(run(2, collected, _warnings, kind)):
        for key, texts in found.items():
            method, what = key.split(", ")
            if method in MASKED or what == "all":
                assert not texts, key
            else:
                assert len(texts) == 1 or (rank > 0 and not texts)  # it may be said once for all
                for text in texts:
                    assert str(num_lacking) in text
                    assert "embed.weight" in text


# --- steps that were skipped or cut short --------------------------------------------------------


def _skip(kind: str, method: str, in_pass: int, bad_step: int) -> None:
    job = Job.of_net(kind, method)
    for step in range(bad_step):
        job.prepare(step)
        job.take(step)
        job.end()
    job.prepare(bad_step)
    before = job.everything()

    def spoil(count: int, place: str) -> None:
        is_odd = kind.startswith("ddp") or dist.get_rank() == 1
        if (count, place) == (in_pass, "end") and is_odd:
            local(job.hidden[0].grad).fill_(math.nan)

    job.take(bad_step, spoil)
    assert job.optimizer.skipped_steps == 1
    assert job.everything() == before
    job.take(bad_step)
    assert job.optimizer.skipped_steps == 1


@selection(
    "kind, method, in_pass",
    [
        *(("fsdp", "CrAM+", 1), ("fsdp", "SAM", 2), ("fsdp, 8 bits", "CrAM+", 2)),
        *(("ddp", "CrAM+", 1), ("ddp, views of buckets", "CrAM+", 2)),
    ],
    KINDS,
    ["CrAM+", "SAM"],
    [1, 2],
)
def test_a_skipped_step_leaves_all_as_before_it(
    run: Run, kind: str, method: str, in_pass: int
) -> None:
    run(2, collected, _skip, kind, method, in_pass, in_pass % 2)


def _cut_short(kind: str, method: str, in_pass: int, where: str) -> None:
    job, undisturbed = Job.of_net(kind, method), Job.of_net(kind, method)
    for step in range(3):
        for each in (job, undisturbed):
            each.prepare(step)
        if step == 1:
            before = job.everything()
            try:
                job.take(step, failing(in_pass, where))
            except LookupError:
                pass
            else:
                raise AssertionError("nothing was raised")
            assert job.everything() == before
        for each in (job, undisturbed):
            each.take(step)
        assert job.everything() == undisturbed.everything()
        for each in (job, undisturbed):
            each.end()
    assert job.losses == undisturbed.losses


# DDP itself can go on only after what is raised at the end.
PLACES = [
    *((kind, where) for kind in KINDS[:2] for where in ("forward", "backward", "end")),
    *((kind, "end") for kind in KINDS[2:]),
]
PASSES = [("CrAM+", 1), ("CrAM+", 2), ("SAM", 2), ("ACDC", 1), ("GMP", 1)]


@selection(
    "place, method_and_pass",
    [
        *((("fsdp", "forward"), ("CrAM+", 1)), (("fsdp, 8 bits", "end"), ("CrAM+", 1))),
        *((("fsdp", "end"), ("CrAM+", 2)), (("fsdp, 8 bits", "backward"), ("CrAM+", 2))),
        *((("ddp, views of buckets", "end"), ("SAM", 2)), (("fsdp", "backward"), ("ACDC", 1))),
    ],
    PLACES,
    PASSES,
)
def test_a_step_that_was_cut_short_leaves_no_trace(
    run: Run, place: tuple[str, str], method_and_pass: tuple[str, int]
) -> None:
    run(2, collected, _cut_short, place[0], *method_and_pass, place[1])


# --- two optimizers, against what they do written plainly ----------------------------------------


def _train_with_two(kind: str, method: str, options: dict[str, Any]) -> None:
    def reference() -> dict[str, Tensor]:
        plain = make_model(1, **options)
        train_plainly(plain, range(dist.get_world_size()), **PAIRS[method])
        return {name: p.detach() for name, p in plain.named_parameters()}

    expected = found_by_one(reference)
    toy = make_model(1, **options)
    called: nn.Module = _parallel(kind, toy)

    def closure_of(step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss: Tensor = called(*make_batch(toy, step))
            loss.backward()
            return loss.detach()

        return closure

    # DDP calls parameters by other names.
    train_with_two(method, toy if kind.startswith("ddp") else called, closure_of)
    torch.testing.assert_close(full_state(toy), expected, rtol=1e-5, atol=1e-6)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # Ranks, and the toy's peculiarities.
    "fsdp": (2, {"tied": True}),
    "fsdp, 32 bits": (3, {"frozen": True}),
    "ddp": (2, {}),
    "ddp, views of buckets": (2, {"tied": True}),
}


@selection(
    "kind, method",
    [
        *(("fsdp", "SAM"), ("fsdp, 32 bits", "CrAM"), ("ddp, views of buckets", "CrAM+")),
    ],
    tuple(LAYOUTS),
    TWO_PASSES,
)
def test_two_optimizers_train_as_written_plainly(run: Run, kind: str, method: str) -> None:
    world_size, options = LAYOUTS[kind]
    run(world_size, collected, _train_with_two, kind, method, options)


# --- a part of a larger model -------------------------------------------------------------------


class _Larger(nn.Module):
    """A model that FSDP2 shards as one, of which an optimizer knows a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = make_model(1, num_layers=1)
        self.norm, self.rest = nn.BatchNorm1d(5), nn.Linear(5, 5)

    def forward(self, *batch: Tensor) -> Tensor:
        loss: Tensor = self.part(*batch)
        return loss + self.norm(self.rest(loss + torch.arange(20.0).view(4, 5))).square().mean()


def _train_a_part(method: str) -> None:
    model = _Larger()
    models: list[Any] = [model, copy.deepcopy(model)]
    for model in models:
        shard(model.part)
        fully_shard(model)
    part = models[0].part
    optimizer = METHODS[method](part, torch.optim.SGD(part.parameters(), lr=0.0))

    def run_pass(model: nn.Module) -> None:
        model(*make_batch(part, 0)).backward()

    optimizer.step(lambda: run_pass(models[0]))
    run_pass(models[1])
    for mine, plain in zip(*(model.buffers() for model in models), strict=True):
        assert torch.equal(mine, plain)
    for name in ("weight", "bias"):
        mine, plain = (model.rest.get_parameter(name).grad.to_local() for model in models)
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("method", ["CrAM", "SAM"])
def test_the_rest_of_a_model_of_which_a_part_is_given_sees_one_pass(run: Run, method: str) -> None:
    run(2, _train_a_part, method)
