"""Nothing grows from step to step in one process.

tests_distributed/fsdp/test_growth.py has the wire.
"""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsdp
from qsdp.report.metrics import MetricsWriter
from qsdp.report.progress import RunProgress
from tests.support.growth import Experts, grown_since, held

WIDTH, EXPERTS, RANKS = 8, 6, 2
SETS = [*itertools.combinations(range(EXPERTS), 3)]


def _grown(do: Callable[[int], object], early: int, steps: int) -> dict[str, tuple[int, int]]:
    """What twice as many steps hold more of."""
    for step in range(early):
        do(step)
    before = held()
    for step in range(early, early + steps):
        do(step)
    return grown_since(before)


def test_a_simulation_does_not_grow_with_its_steps() -> None:
    model = Experts(WIDTH, EXPERTS)
    config = qsdp.QSDPConfig(
        weight_bits=4, grad_bits=4, levels="learned", level_steps=(*range(1, 100, 2),), budget=5.0
    )
    simulated = qsdp.simulate(
        model,
        config,
        world_size=RANKS,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        loss=lambda y_BC: y_BC.square().mean(),
    )

    def step(number: int) -> None:
        model.chosen = SETS[number % len(SETS)]
        name = f"layers.{model.chosen[0]}.weight"
        mask = torch.rand(WIDTH, WIDTH) < 0.5
        with torch.no_grad():
            for shards, rows in zip(simulated.shards, mask.chunk(RANKS), strict=True):
                shards[name].masked_fill_(~rows, 0)
        for masks in ({name: mask}, None):
            simulated.set_support(masks, with_grads=masks is None or number % 2 == 1)
            inputs = torch.randn(RANKS, 1 + number % 4, WIDTH)
            simulated.step([[*inputs]])
        simulated.state()
        simulated.weights()

    assert _grown(step, 20, 20) == {}


@pytest.mark.parametrize("is_bar", [False, True])
def test_progress_does_not_grow_with_the_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_bar: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if is_bar else "NO_COLOR", "1")
    line = {"loss": 1.0, "tokens_per_s": 1e4, "wire_bytes_sent": 1e6}
    found = []
    tracemalloc.start()
    with RunProgress(0, 10_000, is_shown=True) as progress:
        assert progress._is_bar == is_bar
        for step in range(1, 3601):
            progress.show(line | {"step": step})
            if step % 1200 == 0:  # rich keeps the last thousand
                progress.note(f"step {step}")
                capsys.readouterr()
                found.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert found[2] < found[1] + 2e4


def test_a_resume_reads_the_lines_of_a_long_run_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    errors = {f"blocks.{i}.weight": {"weight": 0.1, "grad": 0.2} for i in range(20)}
    with path.open("w") as file:
        for step in range(1, 1001):
            file.write(json.dumps({"step": step, "loss": 1.0, "wire_errors": errors}) + "\n")
    tracemalloc.start()
    with MetricsWriter(path, last_step=999) as writer:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < path.stat().st_size / 4
        assert [line["step"] for line in writer.history] == [*range(1, 1000)]


def _optimizer(model: nn.Module, prunable: str = "*.weight") -> tuple[Any, torch.optim.Optimizer]:
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = qsdp.ACDCSchedule(steps=1000, warmup=1, phase=400, last_dense=0, last_sparse=1)
    return qsdp.ACDC(model, base, schedule=schedule, prunable=[prunable]), base


def test_an_optimizer_forgets_the_parameters_that_its_model_has_dropped() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    optimizer, base = _optimizer(model, "?.weight")

    def step(number: int) -> None:
        name = f"head {number}"
        model.add_module(name, nn.Linear(WIDTH, WIDTH))
        head = list(model.get_submodule(name).parameters())
        base.param_groups[0]["params"] += head
        model(torch.randn(2, WIDTH)).square().mean().backward()
        optimizer.step()
        delattr(model, name)
        del base.param_groups[0]["params"][-len(head) :]
        for parameter in head:
            base.state.pop(parameter, None)
        optimizer.zero_grad()

    assert _grown(step, 5, 5) == {}


@pytest.mark.parametrize("method", [qsdp.SAM, partial(qsdp.ACDC, prunable=["*"], schedule=10)])
def test_wrapping_a_base_again_leaves_no_hook_of_the_last_time(method: Any) -> None:
    model = Experts(WIDTH, EXPERTS)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    assert _grown(lambda _: method(model, base), 2, 2) == {}
    assert not base._optimizer_load_state_dict_pre_hooks
    assert not base._optimizer_load_state_dict_post_hooks


def test_masks_of_the_second_pass_take_one_bit_a_weight() -> None:
    model = nn.Linear(512, 512)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = qsdp.CrAM(model, base, sparsity=0.5, prunable=["weight"])
    optimizer.share_support(lambda masks, *, with_grads=True: None)
    seen = []

    def closure() -> Tensor:
        loss = model(torch.ones(2, 512)).square().mean()
        loss.backward()
        seen.append(held()["bytes of tensors"])
        return loss

    optimizer.step(closure)
    more = seen[1] - seen[0]
    # Weights and gradients of before, and the masks.
    numel = sum(p.numel() for p in model.parameters())
    assert more <= 8 * numel + 512 * 512 // 8 + 64
