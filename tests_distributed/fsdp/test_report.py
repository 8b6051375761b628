"""The report of a handle: how every parameter travels, and why."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import qsdp
from qsdp.ops import native
from tests_distributed.support.helpers import make_model, shard
from tests_distributed.support.running import Run


def _report(options: dict[str, Any], config: dict[str, Any]) -> tuple[list[str], Any, str]:
    model = shard(make_model(**options))
    report = qsdp.install(model, qsdp.QSDPConfig(**config)).report()
    return [name for name, _ in model.named_parameters()], report, str(report)


def test_the_report_lists_every_parameter_with_how_and_why(run: Run) -> None:
    config = {
        "weight_bits": 6,
        "grad_bits": 4,
        "grad_rotation": "hadamard",
        "rounding": "nearest",
        "policy": (("*.up.weight", 3), ("head.*", 16), ("*.gain", 32), ("*norm2.bias", 8)),
    }
    for names, report, text in run(2, _report, {"tied": False, "frozen": True}, config):
        assert [row.name for row in report.rows] == names
        rows = {row.name: row for row in report.rows}
        default = rows["blocks.1.qkv.weight"]
        assert (default.weight, default.why) == ("6 bits", "default")
        assert default.grad == "4 bits, rotated"
        assert default.shape == (30, 10)
        frozen = rows["blocks.0.out.weight"]
        assert (frozen.weight, frozen.grad) == ("6 bits", "none")
        assert "frozen" in frozen.why
        policy = rows["blocks.0.mlp.up.weight"]
        assert (policy.weight, policy.grad, policy.why) == (
            "3 bits",
            "3 bits, rotated",
            "policy",
        )
        assert rows["head.weight"].weight == "bfloat16"
        assert (rows["blocks.0.mlp.gain"].weight, rows["blocks.0.mlp.gain"].why) == (
            "raw float32",
            "policy",
        )
        assert rows["blocks.0.norm2.bias"].weight == rows["blocks.0.norm2.bias"].grad == "8 bits"
        norm = rows["norm.weight"]
        assert (norm.weight, norm.grad) == ("raw float32", "raw")
        assert "norm or bias" in norm.why
        assert rows["blocks.0.mlp.gain"].group != rows["blocks.0.qkv.weight"].group
        assert len({row.group for row in report.rows}) == 5
        assert any("biased" in remark for remark in report.remarks)
        assert any("rotation: gradients of 2 to 6 bits" in remark for remark in report.remarks)
        for row in report.rows:
            assert any(row.name in line and row.why in line for line in text.splitlines())
        assert all(remark in text for remark in report.remarks)


def test_a_tied_weight_is_listed_once_and_a_clean_install_names_its_kernels(run: Run) -> None:
    for names, report, _ in run(3, _report, {"tied": True}, {}):
        assert [row.name for row in report.rows] == names
        assert "head.weight" not in names
        assert report.remarks == (native.remark(torch.device("cpu")),)


def _without_kernels() -> str:
    """What a rank hears of the other's machine, which lacks what is required."""
    wrong = RuntimeError("QSDP_REQUIRE_NATIVE is 1, but _qsdp_cuda.so is not installed")
    broken = mock.patch.object(native, "serving", side_effect=wrong)
    with broken if dist.get_rank() else nullcontext(), pytest.raises(RuntimeError) as raised:
        qsdp.install(shard(make_model()))
    return str(raised.value)


def test_kernels_that_are_required_but_absent_are_refused_on_all_ranks(run: Run) -> None:
    for heard in run(2, _without_kernels):
        assert "_qsdp_cuda.so is not installed" in heard


def _thawed() -> tuple[tuple[str, str], tuple[str, str]]:
    model = shard(make_model(frozen=True))
    handle = qsdp.install(model)
    (before,) = [row for row in handle.report().rows if row.name == "blocks.0.out.weight"]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    (after,) = [row for row in handle.report().rows if row.name == "blocks.0.out.weight"]
    return (before.grad, before.why), (after.grad, after.why)


def _remarks(**options: Any) -> tuple[str, ...]:
    return qsdp.install(shard(make_model()), qsdp.QSDPConfig(**options)).report().remarks


def test_the_report_says_whose_payloads_are_kept(run: Run) -> None:
    for _, remark in run(2, functools.partial(_remarks, gather="once")):
        assert remark.startswith("gather once: payloads of modules in training mode are kept")


def _embeddings(context: int) -> list[str]:
    report = qsdp.install(shard(make_model(context=context))).report()
    return [row.name for row in report.rows if row.why == "embedding or head"]


def test_the_head_is_found_beside_a_long_table_of_positions(run: Run) -> None:
    for context in (8, 64):
        for names in run(2, _embeddings, context):
            assert names == ["embed.weight", "position.weight", "head.weight"]


def test_the_report_knows_what_is_trained_now(run: Run) -> None:
    for before, after in run(2, _thawed):
        assert before == ("none", "default, frozen")
        assert after == ("8 bits", "default")
