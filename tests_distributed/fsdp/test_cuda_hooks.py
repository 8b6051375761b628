"""The hooks on a GPU, which gloo ranks share: the numbers of CPUs, whatever the streams do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

import qsdp
from qsdp.comm import transport
from qsdp.ops import native
from tests_distributed.support import alike
from tests_distributed.support.alike import CASES, MORE_CASES, RACES, Case, assert_equal
from tests_distributed.support.apart import APART, train_apart
from tests_distributed.support.cram_steps import compare_with_one_process
from tests_distributed.support.helpers import full_state, make_batch, make_model, shard
from tests_distributed.support.launching import SMALL, TEXT, start
from tests_distributed.support.masked_steps import compare
from tests_distributed.support.running import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DEVICE = "cuda"


@pytest.mark.parametrize("case", CASES | MORE_CASES)
def test_a_gpu_trains_as_cpus_do_bit_for_bit(run: Run, case: str) -> None:
    chosen = (CASES | MORE_CASES)[case]
    by_cpu = run(chosen.ranks, alike.trained, chosen, "cpu")
    by_gpu = run(chosen.ranks, alike.trained, chosen, DEVICE)
    assert_equal(by_gpu, by_cpu)


@pytest.mark.parametrize("case", RACES)
def test_delays_on_the_streams_change_nothing(run: Run, case: str) -> None:
    chosen = RACES[case]
    expected = run(chosen.ranks, alike.trained_in_order, chosen, DEVICE)
    for seed in range(3):
        found = run(chosen.ranks, alike.trained, chosen, DEVICE, seed)
        assert_equal(found, expected)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, payloads arrive at once, and the host must not wait for the GPU."""

    def all_gather(output: Tensor, input: Tensor, group: Any, **_: Any) -> transport.Arrival:
        output.view(group.size(), -1)[:] = input.clone()
        return transport.Arrival(output, None)

    def all_to_all(output: Tensor, input: Tensor, *_: Any) -> transport.Arrival:
        output.copy_(input)
        return transport.Arrival(output, None)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with (
            mock.patch.object(transport, "start_all_gather", all_gather),
            mock.patch.object(transport, "start_all_to_all", all_to_all),
        ):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _pass_without_waiting(case: Case) -> None:
    model, _ = alike.make(case, DEVICE)
    for step in range(2):
        alike.take_step(model, case, step, DEVICE, [])
    batch = alike.constants(model, 7, DEVICE)
    with _no_waiting():
        model(batch).backward()
    torch.cuda.synchronize()


# A sparse wire is not among them: its copies are Python's on a GPU, which wait.
@pytest.mark.skipif(not native.has_cuda_kernels(), reason="Python's kernels wait")
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(prefetch=True, is_bf16=True, config={"weight_bits": 4, "grad_bits": 4}),
        Case(config={"gather": "once", "levels": "learned", "weight_bits": 3}),
    ],
    ids=["8 bits", "4 bits, bf16, prefetched", "kept, learned levels"],
)
def test_a_pass_never_waits_for_the_gpu(run: Run, case: Case) -> None:
    run(2, _pass_without_waiting, case)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (10, {}),
        (10, {"plus": False, "max_norm": 0.2}),
        (16, {"sparsity": ("2:4", "0.5+layer", "0.5+block4", "4bit")}),
    ],
    ids=["plus", "clipped", "patterns"],
)
def test_a_cram_step_on_shards_is_that_of_one_process(
    run: Run, ranks: int, width: int, options: dict[str, Any]
) -> None:
    toy = {"width": width, "hidden": width // 2}
    run(ranks, compare_with_one_process, "fsdp", toy, True, options, DEVICE)


@pytest.mark.parametrize("variant", ["0.9", "gmp"])
def test_masked_steps_on_shards_are_those_of_one_process(run: Run, variant: str) -> None:
    run(2, compare, "fsdp", variant, {}, DEVICE)


def _losses(method: str, bits: int | None) -> list[float]:
    """Twelve steps; without bits on stock FSDP2."""
    model = shard(make_model(width=64, hidden=64).to(DEVICE))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01, fused=DEVICE == "cuda")
    handle = None
    if bits is not None:
        handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=bits, grad_bits=bits))
    else:
        for module in (*model.blocks, *(block.mlp for block in model.blocks), model):
            cast(Any, module).set_force_sum_reduction_for_comms(True)  # not every gloo averages
    if method == "cram":
        optimizer = qsdp.CrAM(model, optimizer, sparsity=(0.5, 0.8))
    elif method == "acdc":
        schedule = qsdp.ACDCSchedule(steps=12, warmup=2, phase=3, last_dense=3, last_sparse=3)
        optimizer = qsdp.ACDC(model, optimizer, schedule=schedule, target=0.8)
    if handle is not None and method != "adamw":
        optimizer.share_support(handle.set_support)
    losses = []
    for step in range(12):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(*make_batch(model, step))
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    state = full_state(model)
    assert all(value.isfinite().all() for value in state.values())
    if method == "acdc":
        matrices = [p for name, p in state.items() if "blocks" in name and p.ndim == 2]
        pruned = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
        assert pruned == pytest.approx(0.8, abs=1e-3)
    return losses


@pytest.mark.parametrize("method", ["adamw", "cram", "acdc"])
def test_the_quantized_wire_follows_full_precision(run: Run, method: str) -> None:
    full = run(2, _losses, method, 32)
    for bits, most in ((8, 0.1), (4, 0.5)):
        found = run(2, _losses, method, bits)
        for mine, theirs in zip(found, full, strict=True):
            assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < most


def test_stock_fsdp2_is_met_at_full_precision(run: Run) -> None:
    stock = run(2, _losses, "adamw", None)
    for ours, theirs in zip(run(2, _losses, "adamw", 32), stock, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("case", ["after good steps", "when all change"])
def test_all_ranks_say_which_gradients_differ(run: Run, case: str) -> None:
    steps, _ = APART[case]
    for message, _ in run(3, train_apart, steps, 1, {}, DEVICE):
        assert "has no gradient of blocks.1.wide.weight" in message


def _errors() -> dict[str, dict[str, float | None]]:
    model = shard(make_model(width=64, hidden=64).to(DEVICE))
    handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=4))
    with handle.measuring():
        model(*make_batch(model, 0)).backward()
    assert all(seconds > 0 for seconds in handle.times.snapshot().values())
    return handle.errors()


def test_errors_are_measured_alike_on_all_ranks(run: Run) -> None:
    first, second = run(2, _errors)
    assert first == second
    found = cast(dict[str, float], first["blocks.0.qkv.weight"])
    assert 0.01 < found["weight"] < 0.2
    assert 0 < found["grad"] < 0.02


def _train(tmp_path: Path, *flags: str) -> str:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    folder = [*("--data", str(text)), *("--out", str(tmp_path / "out"))]
    return start("--backend", "gloo", *folder, *SMALL, *flags).succeed()


def test_a_run_over_gloo_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    flags = ["--qsdp-bits", "8", "--cram", "--precision", "bf16", "--one-shot", "0.5"]
    _train(tmp_path, *flags, "--steps", "6", "--save-every", "3")
    on = ["--resume", str(tmp_path / "out")]
    said = _train(tmp_path, *flags, "--steps", "9", "--save-every", "3", *on)
    assert "Going on from" in said
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["gather_wire_s"] > 0 for line in lines)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="not one GPU")
def test_ranks_that_share_a_gpu_are_told_of_gloo(tmp_path: Path) -> None:
    job = start("--out", str(tmp_path))
    assert job.wait() != 0
    assert "let ranks share GPUs with --backend gloo" in job.output


def _remark() -> str:
    return qsdp.install(shard(make_model().to(DEVICE))).report().remarks[0]


@pytest.mark.skipif(not native.has_cuda_kernels(), reason="qsdp was built without CUDA kernels")
def test_the_report_names_the_kernels_of_the_gpu(run: Run) -> None:
    for remark in run(2, _remark):
        assert re.fullmatch(r"kernels: cuda sm_\d+", remark)


def test_the_self_check_holds() -> None:
    said = start("--backend", "gloo", program="launch/selfcheck.py").succeed()
    assert said.count("holds") == 6
