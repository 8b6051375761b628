"""The trainer with --qsdp-gather delta: what its metrics say, beside validations and methods."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsdp.report.progress import RunProgress
from qsdp.train.config import TrainConfig
from qsdp.train.loop import train_step, validate_in_loop
from qsdp.train.setup import set_up
from qsdp.train.world import World
from tests_distributed.support.launching import TEXT
from tests_distributed.support.running import Run

STEPS = 4


def _lines(folder: Path, validates: bool, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a few steps; a validation may come after each but the last."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, torch.device("cpu"), "gloo", init_device_mesh("cpu", (size,)))
    config = TrainConfig.of(
        data=str(folder / "text.txt"),
        out=str(folder / f"out{validates}{'-'.join(settings)}"),
        qsdp_bits=4,
        qsdp_gather="delta",
        model="tiny",
        steps=9,
        seq_len=16,
        batch_size=2,
        eval_batches=2,
        **settings,
    )
    with ExitStack() as held:
        job = set_up(config, world, held)
        assert job is not None
        lines = []
        for step in range(STEPS):
            lines.append(train_step(job))
            if validates and step + 1 < STEPS:
                validate_in_loop(job, RunProgress(0, STEPS, is_shown=False), lines[-1])
    return lines


def test_a_validation_changes_neither_the_training_nor_what_is_said_of_its_bytes(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    plain, beside = (run(2, _lines, tmp_path, validates)[0] for validates in (False, True))
    assert [line["loss"] for line in plain] == [line["loss"] for line in beside]
    for name in ("changed_codes", "redrawn_buckets"):
        plain_total, total = (sum(line[name] for line in lines) for lines in (plain, beside))
        assert plain_total == total > 0
    assert plain[0]["redrawn_buckets"] > 100  # all of them
    assert all(line["changed_codes"] > 0 for line in plain[1:])
    # What a validation sends for the next step counts as this one's; then headers are left.
    headers = beside[-1]["gather_bytes"]
    assert 0 < headers < plain[-1]["gather_bytes"] / 5
    sent, with_headers = (sum(line["gather_bytes"] for line in each) for each in (plain, beside))
    assert with_headers == sent + (STEPS - 1) * headers
    for line in plain + beside:
        assert line["wire_bytes_sent"] == line["gather_bytes"] + line["reduce_bytes"]


METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "CrAM": {"cram": True},
    "SAM": {"sam": True},
    "ACDC": {"acdc": True, "acdc_warmup": 2, "acdc_phase": 2, "acdc_last_dense": 2}
    | {"acdc_last_sparse": 3, "acdc_sparsity": 0.75},
    "GMP": {"gmp": True, "gmp_start": 2, "gmp_every": 2, "gmp_end": 6, "gmp_sparsity": 0.75},
    "replicas": {"replicas": 2},
}


def _by_method(folder: Path, methods: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of four steps, whose weights hardly move."""
    return {m: _lines(folder, False, lr=1e-5, **METHODS[m]) for m in methods}


def test_with_every_method_all_codes_are_sent_only_where_they_have_to_be(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    found = run(2, _by_method, tmp_path, ("AdamW", "CrAM", "SAM", "ACDC", "GMP"))[0]
    plain = found.pop("AdamW")
    whole, all_buckets = plain[0]["gather_bytes"], plain[0]["redrawn_buckets"]
    for method, lines in found.items():
        for step, (line, alone) in enumerate(zip(lines, plain, strict=True)):
            where = f"{method}, step {step}"
            assert math.isfinite(line["loss"]), where
            if method in ("CrAM", "SAM"):  # each second pass sends all that it does not prune
                second = line["gather_bytes"] - alone["gather_bytes"]
                assert 0.4 * whole < second < 1.1 * whole, where
                assert line["redrawn_buckets"] <= alone["redrawn_buckets"] + 20, where
            elif step == 2:  # the first one under masks
                assert line["pruned"] >= 0.5, where
                assert all_buckets / 5 < line["redrawn_buckets"] < all_buckets / 1.5, where
                assert line["gather_bytes"] < 0.6 * whole, where
            else:
                assert line["redrawn_buckets"] == all_buckets or (
                    step and line["redrawn_buckets"] < all_buckets / 20
                ), where


@pytest.mark.heavy
def test_two_replicas_of_the_trainer_send_changes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    for found in run(4, _by_method, tmp_path, ("replicas",)):
        lines = found["replicas"]
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert all(line["changed_codes"] > 0 for line in lines[1:])
        assert lines[-1]["gather_bytes"] < lines[0]["gather_bytes"] / 5
