"""What is not finite on one rank: all ranks leave the step out, say the same of it, and end alike.
See tests/train/test_not_finite.py for one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import qsdp
from qsdp import checkpoint
from qsdp.compat import torch_collectives as collectives
from qsdp.methods.grad_norm import global_grad_norm
from qsdp.train import loop
from qsdp.train.config import TrainConfig
from tests.support.optimizers import METHODS, RARELY_RENEWED, TWO_PASSES, adamw, all_bits
from tests_distributed.support.helpers import make_batch, make_model, shard, wire_config
from tests_distributed.support.jobs import Jobs, read_metrics
from tests_distributed.support.launching import SMALL, TEXT
from tests_distributed.support.running import Run, selection

RANKS = 3
WEIGHT = "blocks.1.qkv.weight"
Fault = tuple[str, int, int]
"""``loss``, or the parameter whose gradient it is; in which pass of a step; on which rank."""


def _parts(model: nn.Module, base: torch.optim.Optimizer) -> dict[str, Any]:
    """Bits of this rank's weights and second moments."""
    parts: dict[str, Any] = {}
    for name, p in model.named_parameters():
        parts[name] = p.to_local()  # type: ignore[attr-defined]
        parts[f"{name} squared"] = base.state[p]["exp_avg_sq"].to_local()
    return all_bits(parts)


def _leave_out(method: str, num_bits: int, faults: list[Fault], num_replicas: int = 1) -> list[Any]:
    """What the optimizer says of each of the bad steps, with replicas.

    And this rank's bits after a good one.
    """
    meshes: dict[str, Any] = {}
    if num_replicas > 1:
        shape = (num_replicas, dist.get_world_size() // num_replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        meshes = {"mesh": mesh if num_bits == 32 else mesh["shard"]}
    model = shard(make_model(1), nested=False, **meshes)
    base = adamw(model)
    wrapper: Any = None
    if method != "adamw":
        wrapper = (RARELY_RENEWED | {m: METHODS[m] for m in TWO_PASSES})[method](model, base)
    if num_bits < 32:
        config = wire_config(16, weight_bits=num_bits, grad_bits=num_bits)
        replicas = {"replicate_mesh": mesh["replicate"]} if num_replicas > 1 else {}
        handle = qsdp.install(model, config, **replicas)
        if wrapper is not None:
            wrapper.share_support(handle.set_support)
    job: Any = SimpleNamespace(model=model, config=TrainConfig())
    told: list[Any] = []
    for step, fault in enumerate([None, *faults, None]):
        passes = 0

        def closure(step: int = step, fault: Fault | None = fault) -> Tensor:
            nonlocal passes
            passes += 1
            loss = model(*make_batch(model, seed=step))
            loss.backward()
            what, in_pass, rank = fault or ("", 0, 0)
            if (in_pass, rank) != (passes, dist.get_rank()):
                return loss
            if what == "loss":
                return loss * math.nan
            model.get_parameter(what).grad.to_local().fill_(math.inf)  # type: ignore[union-attr]
            return loss

        before = _parts(model, base) if step else {}
        model.zero_grad()
        if wrapper is None:
            loss = closure()
            _, bad = loop._clip(job, loss)  # which leaves what is not finite as it is
            norm = qsdp.clip_grad_norm_(model.parameters(), 1.0, loss=loss)
            assert math.isfinite(norm) == (bad is None)
            if math.isfinite(norm):
                base.step()
            else:
                told.append((bad, len(told) + 1))
        else:
            wrapper.step(closure)
            norm = wrapper.last_grad_norm
        assert math.isfinite(norm) == (fault is None)
        assert (_parts(model, base) == before) == (fault is not None)
        if fault is not None and wrapper is not None:
            told.append((wrapper.last_bad, wrapper.skipped_steps))
    assert all(p.isfinite().all() for p in model.parameters())
    return [told, _parts(model, base) if num_replicas > 1 else None]


@selection(
    "method, num_bits",
    [("adamw", 32), ("CrAM+", 8), ("SAM", 32), ("ACDC", 8), ("GMP", 32)],
    ("adamw", *METHODS),
    (8, 32),
)
def test_all_ranks_leave_a_step_out_whose_loss_or_gradient_is_bad_on_one(
    run: Run, method: str, num_bits: int
) -> None:
    """The gain has one value, on rank 0: the others' shards of it are empty."""
    last = 2 if method in TWO_PASSES else 1
    faults = [("loss", 1, 1), (WEIGHT, last, 2), ("loss", last, 0)]
    found = run(RANKS, _leave_out, method, num_bits, faults)
    assert found == [found[0]] * RANKS
    (first, second, third), counts = zip(*found[0][0], strict=True)
    assert counts == (1, 2, 3)
    assert first.startswith("the loss on rank 1")
    assert second.startswith(f"the gradient of {WEIGHT} on rank 2")
    assert third.startswith("the loss on rank 0")
    assert all(("second pass" in words) == (last == 2) for words in (second, third))


@selection(
    "method, num_bits",
    [("CrAM+", 8), ("adamw", 32)],
    ("adamw", *METHODS),
    (8, 32),
)
def test_replicas_leave_out_what_is_bad_on_one_rank_of_one_of_them(
    run: Run, method: str, num_bits: int
) -> None:
    """Ranks 0 and 1 are a replica, whose meshes do not hold the others: the wire averages."""
    last = 2 if method in TWO_PASSES else 1
    faults = [("loss", 1, 1), (WEIGHT, last, 2)]
    (told, one), (_, other), *others = run(4, _leave_out, method, num_bits, faults, 2)
    assert others == [[told, one], [told, other]]
    assert one.keys() == other.keys()
    assert [words.partition(",")[0] for words, _ in told] == [
        "the loss on rank 1",
        f"the gradient of {WEIGHT} on rank 2",
    ]
    assert [count for _, count in told] == [1, 2]


def _count_gathers(work: Callable[[], object]) -> int:
    with mock.patch.object(
        collectives, "all_gather_single", wraps=collectives.all_gather_single
    ) as gathers:
        work()
    return gathers.call_count


def _norms_with_a_loss() -> tuple[list[int], list[float]]:
    """How many collectives the norm takes without and with a loss.

    Then plain tensors' norm with a loss that is bad on one rank.
    """
    model = shard(make_model(1))
    model(*make_batch(model, seed=0)).backward()
    plain = nn.Parameter(torch.ones(4))
    plain.grad = torch.ones(4)
    loss = math.nan if dist.get_rank() == 1 else 1.0
    given = (None, loss)
    counts = [
        _count_gathers(lambda v=v: global_grad_norm(model.parameters(), loss=v)) for v in given
    ]
    return counts, [global_grad_norm([plain], loss=v) for v in given]


def test_a_loss_rides_on_the_norms_collective_and_decides_nothing_where_there_is_none(
    run: Run,
) -> None:
    for (without, with_loss), norms in run(2, _norms_with_a_loss):
        assert with_loss == without
        assert norms == [2.0, 2.0]


def _learn_past_a_bad_step(config: qsdp.QSDPConfig) -> list[dict[str, Any]]:
    """The wire's state after a step with gradients that are not finite on one rank.

    It was to learn of these. Then the state after another step.
    """
    model = shard(make_model(1), nested=False)
    handle = qsdp.install(model, config)
    states = []
    for step in range(3):
        loss = model(*make_batch(model, seed=step))
        is_bad = step == 1 and dist.get_rank() == 1
        (loss * (math.nan if is_bad else 1.0)).backward()
        model.zero_grad()
        states.append(handle.state_dict())
    for state in states:
        handle.load_state_dict(state)  # which refuses levels that are not finite
    return states[1:]


def test_what_the_wire_learns_of_a_bad_step_is_finite_and_bits_wait_for_the_next(run: Run) -> None:
    learned = wire_config(16, weight_bits=4, grad_bits=4, levels="learned", level_steps=(2, 3))
    for config in (learned, qsdp.QSDPConfig(budget=5.0, warmup_steps=1)):
        one, other = run(2, _learn_past_a_bad_step, config)
        assert one == other
        bad, good = one
        assert not bad["bits"]
        assert bool(good["bits"]) == (config.budget is not None)
        for state in one:
            levels = [level for _, _, _, *row in state["levels"] for level in row]
            assert bool(levels) == (config.levels == "learned")
            assert all(map(math.isfinite, levels))


def test_all_ranks_end_alike_and_keep_the_last_good_checkpoint(
    run_jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    common = ["--data", str(tmp_path / "text.txt"), *SMALL, "--steps", "9", "--warmup-steps", "0"]
    common += ["--save-every", "1", "--max-bad-steps", "2", "--qsdp-bits", "8"]
    commands = [
        [*common, "--out", str(tmp_path / name), "--lr", lr]
        for name, lr in (("finite", "1e20"), ("infinite", "1e40"))
    ]
    diverging, infinite = run_jobs.ends((2,), *commands)
    for ends in (diverging, infinite):
        assert [end.status for end in ends] == [2, 2]
        assert [end.complaint.count("\n") for end in ends] == [1, 0]
    last = tmp_path / "finite/checkpoints/step-00000001"
    said = diverging[0].complaint
    assert "steps 2 to 3 had no finite loss and gradient" in said
    assert "in step 3: the gradient of embed.weight on rank 0 and the loss on rank 0)" in said
    assert f"the last good checkpoint is {last}:" in said
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "finite")] == [0, 1, 2]
    assert [*checkpoint.steps(tmp_path / "finite/checkpoints")] == [1]
    checkpoint.verify(last)
    assert "is not finite on rank 0 after step 1" in infinite[0].complaint
    assert not checkpoint.steps(tmp_path / "infinite/checkpoints")
