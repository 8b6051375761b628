"""What `qsdp.install` promises of its handle: report, traffic, exactness, removal, refusals."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import qsdp
from qsdp import compat
from qsdp.codec import native
from tests_distributed.conftest import Run
from tests_distributed.support.helpers import (
    Toy,
    full_grads,
    full_state,
    make_batch,
    make_model,
    shard,
)

CONFIG = {"bucket_size": 64}
State = dict[str, Tensor]


def _assert_equal(actual: State, expected: State) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def _state(model: nn.Module) -> State:
    """The exact weights, also when some are left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return full_state(model)


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _step(model: Toy, optimizer: torch.optim.Optimizer, seed: int) -> float:
    loss = model(*make_batch(model, seed))
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _train(model: Toy, steps: int) -> tuple[list[float], State]:
    optimizer = _adamw(model)
    losses = [_step(model, optimizer, step) for step in range(steps)]
    return losses, _state(model)


# --- removal and the baseline -----------------------------------------------------------------


def _train_removed(reshard: bool) -> tuple[Any, Any, bool]:
    stock = _train(shard(make_model(1), reshard=reshard), 3)
    model = shard(make_model(1), reshard=reshard)
    groups = compat.parameter_groups(model)
    before = [group.comms() for group in groups]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG, grad_bits=2))
    torch.autograd.backward(model(*make_batch(model, 9)))
    model.zero_grad()
    with torch.no_grad():
        model(*make_batch(model, 9))  # leaves decoded weights gathered when not resharding
    handle.remove()
    after = [group.comms() for group in groups]
    pairs = [p for x, y in zip(before, after, strict=True) for p in zip(x, y, strict=True)]
    same = all(a is b for a, b in pairs)
    same &= hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    tensors = [t for group in groups for t in group.unsharded_parameters() if t is not None]
    same &= not any(getattr(t, "_post_accumulate_grad_hooks", None) for t in tensors)
    with pytest.raises(RuntimeError, match="removed already"):
        handle.remove()
    removed = _train(model, 3)
    qsdp.install(model)  # and it may be installed anew
    return stock, removed, same


@pytest.mark.parametrize("reshard", [True, False])
def test_remove_restores_fsdp2_exactly(run: Run, reshard: bool) -> None:
    for stock, removed, same in run(2, _train_removed, reshard):
        assert same
        assert stock[0] == removed[0]
        _assert_equal(removed[1], stock[1])


def _removed_within_a_step(gather: str) -> list[dict[str, Tensor]]:
    grads = []
    for is_installed in (False, True):
        model = shard(make_model(2))
        if is_installed:
            handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=32, gather=gather))
        loss = model(*make_batch(model, 3))
        if is_installed:
            handle.remove()
        torch.autograd.backward(loss)
        grads.append(full_grads(model))
    return grads


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_a_backward_pass_after_remove_is_that_of_fsdp2(run: Run, gather: str) -> None:
    for stock, removed in run(2, _removed_within_a_step, gather):
        _assert_equal(removed, stock)


def _full_precision(options: dict[str, Any]) -> tuple[Any, Any]:
    both = []
    for is_installed in (False, True):
        model = shard(make_model(2, **options))
        if is_installed:
            qsdp.install(model, qsdp.QSDPConfig(weight_bits=32, grad_bits=32))
        # One backward pass only: AdamW would blow a last bit up where a gradient is nearly zero.
        loss = model(*make_batch(model, 3))
        torch.autograd.backward(loss)
        both.append((float(loss.detach()), full_grads(model)))
    return both[0], both[1]


@pytest.mark.parametrize("options", [{}, {"tied": True, "frozen": True, "unused": True}])
def test_wire_32_is_stock_fsdp2_up_to_the_order_of_sums(run: Run, options: dict[str, Any]) -> None:
    for (stock_loss, stock), (loss, grads) in run(3, _full_precision, options):
        assert loss == stock_loss
        torch.testing.assert_close(grads, stock, rtol=1e-5, atol=1e-8)


# --- report -----------------------------------------------------------------------------------


def _report(options: dict[str, Any], config: dict[str, Any]) -> tuple[list[str], Any, str]:
    model = shard(make_model(**options))
    report = qsdp.install(model, qsdp.QSDPConfig(**config)).report()
    return [name for name, _ in model.named_parameters()], report, str(report)


def test_the_report_lists_every_parameter_with_how_and_why(run: Run) -> None:
    config = {
        "weight_bits": 6,
        "grad_bits": 4,
        "rounding": "nearest",
        "policy": (("*.up.weight", 3), ("head.*", 16), ("*.gain", 32), ("*norm2.bias", 8)),
    }
    for names, report, text in run(2, _report, {"tied": False, "frozen": True}, config):
        assert [row.name for row in report.rows] == names
        rows = {row.name: row for row in report.rows}
        default = rows["blocks.1.qkv.weight"]
        assert (default.weight, default.grad, default.why) == ("6 bits", "4 bits", "default")
        assert default.shape == (30, 10)
        frozen = rows["blocks.0.out.weight"]
        assert (frozen.weight, frozen.grad) == ("6 bits", "none")
        assert "frozen" in frozen.why
        policy = rows["blocks.0.mlp.up.weight"]
        assert (policy.weight, policy.grad, policy.why) == ("3 bits", "3 bits", "policy")
        assert rows["head.weight"].weight == "bfloat16"
        assert (rows["blocks.0.mlp.gain"].weight, rows["blocks.0.mlp.gain"].why) == (
            "raw float32",
            "policy",
        )
        assert rows["blocks.0.norm2.bias"].weight == "8 bits"
        norm = rows["norm.weight"]
        assert (norm.weight, norm.grad) == ("raw float32", "raw")
        assert "norm or bias" in norm.why
        assert rows["blocks.0.mlp.gain"].group != rows["blocks.0.qkv.weight"].group
        assert len({row.group for row in report.rows}) == 5
        assert any("biased" in remark for remark in report.remarks)
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
    wrong = RuntimeError("QSDP_REQUIRE_NATIVE=1 but _qsdp_cuda.so is not installed")
    broken = mock.patch.object(native, "serving", side_effect=wrong)
    with broken if dist.get_rank() else nullcontext(), pytest.raises(RuntimeError) as raised:
        qsdp.install(shard(make_model()))
    return str(raised.value)


def test_kernels_that_are_required_but_absent_are_refused_on_all_ranks(run: Run) -> None:
    for heard in run(2, _without_kernels):
        assert "_qsdp_cuda.so is not installed" in heard


# --- traffic ----------------------------------------------------------------------------------


def _payload(shapes: list[tuple[int, ...]], ranks: int, bits: int, bucket: int) -> tuple[int, int]:
    """Bytes of one payload, and values of all ranks together, from design.md alone."""
    coded, raw, values, meta = 0, 0, 0, 0
    for shape in shapes:
        numel = -(-shape[0] // ranks)
        for size in shape[1:]:
            numel *= size
        values += math.prod(shape)
        if len(shape) < 2 or bits == 32:
            raw += 4 * numel
        else:
            coded += -(-numel * bits // 8)
            meta += 8 * -(-numel // bucket)
    aligned = -(-(32 + meta + raw) // 16) * 16
    return -(-(aligned + coded) // 16) * 16, values


def _traffic(
    reshard: bool, ranks_per_node: int, reduce: str
) -> tuple[list[Any], list[dict[str, int]]]:
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    try:
        model = shard(make_model(unused=True, frozen=True), reshard=reshard)
        same = tuple((name, (5, 3)) for name in ("embed.*", "position.*", "head.*"))
        config = qsdp.QSDPConfig(**CONFIG, weight_bits=5, grad_bits=3, policy=same, reduce=reduce)
        handle = qsdp.install(model, config)
        snapshots = [handle.traffic.snapshot()]
        torch.autograd.backward(model(*make_batch(model, 1)))
        snapshots.append(handle.traffic.snapshot())
        with handle.traffic.paused(), handle.exact(), torch.no_grad():
            model(*make_batch(model, 2))
        snapshots.append(handle.traffic.snapshot())
        with handle.traffic.paused(), torch.no_grad():
            model(*make_batch(model, 2))
        snapshots.append(handle.traffic.snapshot())
    finally:
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ["LOCAL_WORLD_SIZE"] = before
    rows = [
        (row.group, row.shape, "unused" not in row.name and row.grad != "none")
        for row in handle.report().rows
    ]
    return rows, snapshots


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "reshard", "reduce"),
    [(3, 1, True, "auto"), (4, 2, False, "flat"), (4, 2, False, "auto"), (4, 2, True, "two-hop")],
)
def test_the_counters_equal_arithmetic(
    run: Run, ranks: int, ranks_per_node: int, reshard: bool, reduce: str
) -> None:
    is_flat = reduce == "flat" or ranks_per_node == 1
    num_nodes = ranks // ranks_per_node
    everyone = run(ranks, _traffic, reshard, ranks_per_node, reduce)
    for rank, (rows, snapshots) in enumerate(everyone):
        groups = sorted({group for group, _, _ in rows})
        members = [[shape for g, shape, _ in rows if g == group] for group in groups]
        with_grad = [[shape for g, shape, grad in rows if g == group and grad] for group in groups]
        gathers = [_payload(shapes, ranks, 5, 64) for shapes in members]
        exact = [_payload(shapes, ranks, 32, 64) for shapes in members]
        reduces = [_payload(shapes, ranks, 3, 64) for shapes in with_grad if shapes]
        locally = [_payload(shapes, ranks, 8, 64) for shapes in with_grad if shapes]
        num_gathers = 2 if reshard else 1
        peers, intra = ranks - 1, ranks_per_node - 1
        gathered, exactly, reduced, added = (
            [sum(column) for column in zip(*sizes, strict=True)]
            for sizes in (gathers, exact, reduces, locally)
        )
        # A flat all-gather is a ring: all that a rank sends goes to the next one.
        crosses = (rank + 1) % ranks // ranks_per_node != rank // ranks_per_node
        gathers_inside = (0 if crosses else peers) if is_flat else intra * num_nodes
        inside, between = intra * reduced[0], (peers - intra) * reduced[0]
        if not is_flat:
            inside, between = intra * num_nodes * added[0], (num_nodes - 1) * reduced[0]
        assert set(snapshots[0].values()) == {0}
        train = snapshots[1]
        assert train["gather_sent_bytes"] == num_gathers * peers * gathered[0]
        assert train["gather_intra_node_bytes"] == num_gathers * gathers_inside * gathered[0]
        assert train["reduce_intra_node_bytes"] == inside
        assert train["reduce_inter_node_bytes"] == between
        in_fp32 = num_gathers * sum(peers * 4 * values // ranks for _, values in gathers)
        assert train["gather_fp32_bytes"] == in_fp32
        assert train["reduce_fp32_bytes"] == sum(peers * 4 * n // ranks for _, n in reduces)
        assert train["other_sent_bytes"] == 0
        for snapshot in snapshots[2:]:
            for key in train:
                if not key.startswith("other"):
                    assert snapshot[key] == train[key], key
        assert snapshots[2]["other_sent_bytes"] == peers * exactly[0]
        assert snapshots[3]["other_sent_bytes"] == peers * (exactly[0] + gathered[0])


# --- exactness, validation, resume ------------------------------------------------------------


@contextmanager
def _weights_seen(model: nn.Module) -> Iterator[State]:
    """Collects the weight that each linear and embedding layer computes with, by name."""
    seen: State = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name] = module.get_parameter("weight").detach().clone()

        return hook

    handles = [
        module.register_forward_pre_hook(see(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _exact(reshard: bool) -> tuple[State, list[State]]:
    model = shard(make_model(4), reshard=reshard)
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG))
    views = []
    with torch.no_grad():
        for context in (nullcontext(), handle.exact(), nullcontext()):
            with context, _weights_seen(model) as seen:
                model(*make_batch(model, 1))
            views.append(seen)
        with suppress(LookupError), handle.exact():
            model(*make_batch(model, 1))
            raise LookupError
        with _weights_seen(model) as seen:
            model(*make_batch(model, 1))
        views.append(seen)
    return _state(model), views


@pytest.mark.parametrize("reshard", [True, False])
def test_exact_shows_the_exact_weights_and_leaves_no_trace(run: Run, reshard: bool) -> None:
    for state, (before, inside, after, after_error) in run(3, _exact, reshard):
        _assert_equal(inside, {name: state[f"{name}.weight"] for name in inside})
        assert all(not torch.equal(before[name], inside[name]) for name in inside)
        _assert_equal(after, before)
        _assert_equal(after_error, before)


def _train_validated(validation: str, reshard: bool) -> tuple[list[float], State]:
    model = shard(make_model(5), reshard=reshard)
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG))
    optimizer = _adamw(model)
    mode = torch.inference_mode if validation == "inference" else torch.no_grad
    losses = []
    for step in range(2):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            loss = model(*make_batch(model, 2 * step + micro))
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
            if validation == "between micro-batches":
                with handle.exact(), torch.no_grad():
                    model(*make_batch(model, 100 + step))
        optimizer.step()
        optimizer.zero_grad()
        if validation in ("quantized", "inference"):
            for seed in (100, 101):
                with mode():
                    model(*make_batch(model, seed))
        if validation == "exact":
            with handle.exact(), torch.no_grad():
                model(*make_batch(model, 100 + step))
    return losses, _state(model)


@pytest.mark.parametrize("reshard", [True, False])
def test_validation_does_not_change_training(run: Run, reshard: bool) -> None:
    expected = run(2, _train_validated, "none", reshard)
    for validation in ("quantized", "inference", "exact", "between micro-batches"):
        found = run(2, _train_validated, validation, reshard)
        for (losses, state), (expected_losses, expected_state) in zip(found, expected, strict=True):
            assert losses == expected_losses, validation
            _assert_equal(state, expected_state)


def _resumed(folder: str) -> tuple[Any, Any, dict[str, int]]:
    model = shard(make_model(6), reshard=False)
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG, seed=7, rounding="dither"))
    optimizer = _adamw(model)
    for seed in range(2):
        _step(model, optimizer, seed)
    exact = _state(model)
    with torch.no_grad():
        model(*make_batch(model, 50))  # leaves decoded weights: they must not be saved
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    saved = handle.state_dict()
    losses = [_step(model, optimizer, seed) for seed in range(2, 4)]
    expected = losses, _state(model)

    model = shard(make_model(60))
    optimizer = _adamw(model)
    # Other keys and an advanced clock: loading must replace both.
    handle = qsdp.install(model, qsdp.QSDPConfig(**CONFIG, seed=8, rounding="dither"))
    torch.autograd.backward(model(*make_batch(model, 9)))
    model.zero_grad()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = _state(model)
    _assert_equal(loaded, exact)
    handle.load_state_dict(saved)
    losses = [_step(model, optimizer, seed) for seed in range(2, 4)]
    return expected, (losses, _state(model)), saved


def test_a_resumed_run_draws_the_same_random_numbers(run: Run, tmp_path: Any) -> None:
    for expected, found, saved in run(3, _resumed, str(tmp_path / "checkpoint")):
        assert json.loads(json.dumps(saved)) == saved
        assert found[0] == expected[0]
        _assert_equal(found[1], expected[1])


# --- refusals ---------------------------------------------------------------------------------


def _install_twice() -> None:
    model = shard(make_model())
    qsdp.install(model)
    qsdp.install(model)


def _install_on_a_part_then_the_whole() -> None:
    model = shard(make_model())
    qsdp.install(model.blocks[1])
    qsdp.install(model)


def _install_without_fsdp() -> None:
    qsdp.install(make_model())


def _install_with_offloading() -> None:
    qsdp.install(shard(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def _install_with_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = make_model(hidden=6)
    parallelize_module(model.blocks[0].mlp, mesh["tensor"], {"up": ColwiseParallel()})
    qsdp.install(shard(model, mesh=mesh["data"]))


def _install_with_float64() -> None:
    qsdp.install(shard(make_model().double()))


def _install_with_float64_reduce() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    qsdp.install(shard(make_model(), mp_policy=policy))


def _install_with_two_meshes() -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = mesh._flatten("whole")
    model = make_model()
    experts = {id(p) for p in model.blocks[0].mlp.parameters()}
    narrow = ShardPlacementResult(Shard(0), FSDPMeshInfo(mesh["b"], shard_mesh_dim=0))
    wide = ShardPlacementResult(Shard(0), FSDPMeshInfo(whole, shard_mesh_dim=0))
    fully_shard(
        model, mesh=whole, shard_placement_fn=lambda p: narrow if id(p) in experts else wide
    )
    qsdp.install(model)


def _install_with_a_policy_for_nothing() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(policy=(("*.no_such.weight", 4),)))


def _install_with_a_budget_below_two_bits() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=2.2))


def _install_with_a_budget_that_embeddings_take() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=4, embedding_bits=8))


def _install_with_a_budget_for_raw_values() -> None:
    qsdp.install(shard(make_model()), qsdp.QSDPConfig(budget=8, policy=(("*", 32),)))


def _install_with_a_budget_for_bits_of_choice() -> None:
    config = qsdp.QSDPConfig(budget=8, weight_bits=32, grad_bits=16, embedding_bits=2)
    qsdp.install(shard(make_model()), config)


def _install_with_a_dict() -> None:
    qsdp.install(shard(make_model()), {"weight_bits": 8})  # type: ignore[arg-type]


def _refusal(function: Callable[[], None]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("function", "ranks", "words"),
    [
        (_install_twice, 2, "call handle.remove() first"),
        (_install_on_a_part_then_the_whole, 2, "call handle.remove() first"),
        (_install_without_fsdp, 1, "call fully_shard before"),
        (_install_with_offloading, 2, "CPUOffloadPolicy"),
        (_install_with_tensor_parallelism, 4, "tensor parallelism"),
        (_install_with_float64, 2, "float64"),
        (_install_with_a_policy_for_nothing, 2, "matches no parameter"),
        (_install_with_a_budget_below_two_bits, 2, "the budget is 2.2 bits a value, but weights"),
        (_install_with_a_budget_that_embeddings_take, 2, "the budget is 4 bits a value, but"),
        (_install_with_a_budget_for_raw_values, 2, "has nothing to allot"),
        (_install_with_a_budget_for_bits_of_choice, 2, "has nothing to allot"),
        (_install_with_a_dict, 2, "give a qsdp.QSDPConfig"),
        (_install_with_float64_reduce, 2, "float64"),
        pytest.param(
            _install_with_two_meshes,
            4,
            "2 parameter meshes",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.13", reason="per-parameter meshes came with torch 2.13"
            ),
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    run: Run, function: Callable[[], None], ranks: int, words: str
) -> None:
    for message in run(ranks, _refusal, function):
        assert words in message
        assert "\n" not in message


def _disagree(configs: list[dict[str, Any]], steps: list[int]) -> str:
    model = shard(make_model())
    rank = dist.get_rank()
    try:
        handle = qsdp.install(model, qsdp.QSDPConfig(**configs[rank]))
        handle.load_state_dict({**handle.state_dict(), "step": steps[rank]})
        torch.autograd.backward(model(*make_batch(model, 1)))
    except RuntimeError as error:
        return str(error)
    return "trained on garbage"


@pytest.mark.parametrize(
    "other",
    [
        {"weight_bits": 4},
        {"grad_bits": 4},
        {"bucket_size": 8},
        {"rounding": "dither"},
        {"seed": 1},
        {"policy": (("*norm*", 4),)},
        "step",
    ],
    ids=str,
)
def test_ranks_that_disagree_raise(run: Run, other: Any) -> None:
    configs, steps = [{}, {}, {}], [0, 0, 0]
    odd = random.randrange(3)
    if other == "step":
        steps[odd] = 5
    else:
        configs[odd] = other
    for message in run(3, _disagree, configs, steps):
        assert "every rank" in message
        assert "\n" not in message
