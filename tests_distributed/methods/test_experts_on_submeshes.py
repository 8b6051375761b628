"""Ranks that own different experts: norms, thresholds and steps are those of one process that has
the shared weights and all experts."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import qsdp
from qsdp.checkpoint import latest, save
from qsdp.optim import ACDC, GMP, SAM, CrAM, clip_grad_norm_, global_grad_norm
from qsdp.sparsity.compression import compressed, magnitude_masks
from tests.support.cram_reference import top_k_masks
from tests_distributed.conftest import Run, selection
from tests_distributed.support.experts import (
    EXPERTS,
    LAYOUTS,
    Layout,
    Method,
    Together,
    Trail,
    backward_on_rank,
    in_blocks,
    is_expert,
    take_steps,
    train,
    values_of,
)
from tests_distributed.support.helpers import Block, ToyConfig, all_ranks, make_model

PRELOADED = ["torch.distributed.tensor.parallel"]

PHASES = qsdp.ACDCSchedule(steps=6, warmup=1, phase=2, last_dense=1, last_sparse=1)
GRADUAL = qsdp.GMPSchedule(steps=4, sparsity=0.8, initial=0.3, start=1, every=1, end=3)
EXACT = {"weight_bits": 32, "grad_bits": 32}
METHODS: dict[str, Method] = {
    "CrAM+": Method(make=CrAM, options={"sparsity": (0.6, "0.5+4bit")}),
    "CrAM": Method(make=CrAM, options={"plus": False, "max_norm": 0.05, "sparsity": 0.7}),
    "CrAM, normalized": Method(make=CrAM, options={"normalize": True, "sparse_grad": False}),
    "CrAM by layer": Method(make=CrAM, options={"sparsity": "0.7+layer"}),
    "CrAM of experts": Method(make=CrAM, options={"sparsity": 0.6}, prunes="experts"),
    "CrAM around experts": Method(
        make=CrAM,
        options={"normalize": True, "max_norm": 0.02, "sparsity": 0.6},
        prunes="experts",
        base_has="experts",
    ),
    "SAM": Method(make=SAM, options={"rho": 0.1, "max_norm": 0.05}, prunes=None),
    "ACDC": Method(make=ACDC, options={"schedule": PHASES, "max_norm": 0.05}, steps=6),
    "ACDC around experts": Method(
        make=ACDC,
        options={"schedule": PHASES, "target": "0.7", "max_norm": 0.02},
        steps=6,
        prunes="experts",
        base_has="experts",
    ),
    "GMP": Method(make=GMP, options={"schedule": GRADUAL, "max_norm": 0.05}, steps=4),
    "GMP by layer": Method(make=GMP, options={"schedule": GRADUAL, "scope": "layer"}, steps=4),
}
NAMES = tuple(LAYOUTS)
# The wire wants them so.
EVEN = ("two of two", "a rank each", "replicas")


# Norms


Parts = dict[str, Tensor | None]


def _grads(parameters: dict[str, Any]) -> Parts:
    """This rank's part of each."""
    return {
        name: None if p.grad is None else values_of({name: p.grad})[name]
        for name, p in parameters.items()
    }


def _norms(layout: Layout, lacks_grads: int | None) -> dict[str, Any]:
    """With a plain parameter beside, and gradients that rank ``lacks_grads`` has not."""
    model = layout.shard()
    backward_on_rank(model, 0)
    beside = nn.Parameter(torch.ones(7))
    beside.grad = torch.linspace(-0.1, 0.2, 7)
    parameters = {**dict(model.named_parameters()), "beside": beside}
    if dist.get_rank() == lacks_grads:
        for name, parameter in parameters.items():
            parameter.grad = None if name != "beside" else parameter.grad
    before = _grads(parameters)
    norm = global_grad_norm(parameters.values(), loss=float(dist.get_rank()))  # a loss adds nothing
    returned = clip_grad_norm_(parameters.values(), 0.01)
    after, clipped = _grads(parameters), global_grad_norm(parameters.values())
    poisoned = []
    for rank, value in ((0, math.inf), (layout.ranks - 1, math.nan)):
        weight = model.blocks[1].expert.up.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        good = weight.grad.to_local().clone()
        if dist.get_rank() == rank:
            weight.grad.to_local()[0, 0] = value
        poisoned.append(global_grad_norm(parameters.values()))
        weight.grad.to_local().copy_(good)
        loss = torch.tensor(value if dist.get_rank() == rank else 1.0)
        poisoned.append(global_grad_norm(parameters.values(), loss=loss))
    return {
        "norms": (norm, returned, clipped),
        "before": before,
        "after": after,
        "poisoned": poisoned,
    }


@selection(
    "layout, lacks_grads",
    [
        *(("two of two", None), ("replicas", "first")),
        *(("a rank each", None), ("one and two", "last")),
    ],
    NAMES,
    (None, "first", "last"),
)
def test_the_norm_is_one_number_of_all_experts_and_the_rest(
    run: Run, layout: str, lacks_grads: str | None
) -> None:
    chosen = LAYOUTS[layout]
    rank = {None: None, "first": 0, "last": chosen.ranks - 1}[lacks_grads]
    found = run(chosen.ranks, _norms, chosen, rank)
    squares = [
        grad.double().square().sum().item()
        for rank, each in enumerate(found)
        for name, grad in each["before"].items()
        if grad is not None and (chosen.counts(name, rank) if name != "beside" else rank == 0)
    ]
    expected = math.sqrt(sum(squares))
    for each in found:
        assert each["norms"] == found[0]["norms"]
        for name, grad in each["after"].items():
            if grad is not None:
                whole = each["before"][name] * (0.01 / (expected + 1e-6))
                torch.testing.assert_close(grad, whole, rtol=1e-5, atol=0)
        assert not any(math.isfinite(norm) for norm in each["poisoned"])
    norm, returned, clipped = found[0]["norms"]
    assert norm == returned == pytest.approx(expected, rel=1e-12)
    assert clipped == pytest.approx(0.01, rel=1e-3)


def _rows_and_columns() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("down", "across"))
    parameters = []
    for axis in ("down", "across"):
        values = torch.ones(2, 3)
        parameters.append(nn.Parameter(DTensor.from_local(values, mesh[axis], [Shard(0)])))
        parameters[-1].grad = DTensor.from_local(values, mesh[axis], [Shard(0)])
    said = []
    for call in (global_grad_norm, lambda each: clip_grad_norm_(each, 1.0)):
        try:
            said.append(f"not refused: {call(parameters)}")
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_meshes_none_of_which_holds_the_others_are_refused_by_their_ranks(run: Run) -> None:
    for said in run(4, _rows_and_columns):
        for message in said:
            assert "not refused" not in message
            assert "\n" not in message
            numbers = {int(number) for number in re.findall(r"\d+", message)}
            assert any(numbers >= row for row in ({0, 1}, {2, 3})), message
            assert any(numbers >= column for column in ({0, 2}, {1, 3})), message


# Thresholds


TARGETS = (0.0, 0.3, 0.5, 0.9)


def _masks(layout: Layout, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    model = layout.shard(**options)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return [magnitude_masks(parameters, sparsity) for sparsity in TARGETS]


def _expected_masks(together: Together, names: list[str], sparsity: float) -> dict[str, Tensor]:
    tensors = [together.get_parameter(name).detach() for name in names]
    total = sum(tensor.numel() for tensor in tensors)
    masks = top_k_masks(tensors, total - round(sparsity * total))
    return dict(zip(names, masks, strict=True))


STARTS: dict[str, dict[str, Any]] = {"others": {}, "alike": {"alike": True}, "ties": {"tied": True}}


@selection(
    "layout, start",
    [
        *(("two of two", "ties"), ("replicas", "alike")),
        *(("a rank each", "ties"), ("one and two", "others")),
    ],
    NAMES,
    tuple(STARTS),
)
def test_masks_are_those_of_all_experts_and_the_rest_in_one_process(
    run: Run, layout: str, start: str
) -> None:
    chosen, options = LAYOUTS[layout], STARTS[start]
    together = chosen.together(**options)
    expected = [_expected_masks(together, together.names(lambda _: True), s) for s in TARGETS]
    for rank, found in enumerate(run(chosen.ranks, _masks, chosen, options)):
        for sparsity, masks, wholes in zip(TARGETS, found, expected, strict=True):
            for name, mask in masks.items():
                whole = wholes[together.name_of(name, rank)]
                assert torch.equal(mask, chosen.part(name, whole, rank)), (sparsity, name)


def _compressed(layout: Layout, patterns: list[str] | None) -> tuple[dict[str, Tensor], bool]:
    """What is zero inside, and whether the weights come back."""
    model = layout.shard(tied=True)
    parameters = dict(model.named_parameters())
    before = values_of(parameters)
    with compressed(model, 0.5, patterns) as chosen:
        zeros = {name: value == 0 for name, value in values_of(chosen).items()}
    after = values_of(parameters)
    return zeros, all(torch.equal(after[name], value) for name, value in before.items())


@selection(
    "layout, prunes",
    [
        *(("two of two", "default"), ("replicas", "experts")),
        *(("a rank each", "experts"), ("one and two", "experts")),
    ],
    NAMES,
    ("default", "experts"),
)
def test_a_model_compressed_in_one_shot_loses_half_over_all_experts(
    run: Run, layout: str, prunes: str
) -> None:
    chosen, patterns = LAYOUTS[layout], None if prunes == "default" else EXPERTS
    together = chosen.together(tied=True)
    names = together.names(lambda n: in_blocks(n) and (patterns is None or is_expert(n)))
    expected = _expected_masks(together, names, 0.5)
    for rank, (zeros, is_restored) in enumerate(run(chosen.ranks, _compressed, chosen, patterns)):
        assert is_restored
        assert zeros.keys() == {n for n in zeros if together.name_of(n, rank) in expected}
        assert len(zeros) == (6 if patterns is None else 4)
        for name, mask in zeros.items():
            whole = expected[together.name_of(name, rank)]
            assert torch.equal(~mask, chosen.part(name, whole, rank)), name


# Steps


def _train(layout: Layout, name: str, config: dict[str, Any] | None) -> Trail:
    method = METHODS[name]
    model = layout.shard(frozen=method.frozen)
    optimizer = None
    if config is not None:
        handle = qsdp.install(model, qsdp.QSDPConfig(**config))
        optimizer = method.around(model)
        optimizer.share_support(handle.set_support)
    optimizer = optimizer or method.around(model)
    return take_steps(method, model, optimizer, partial(backward_on_rank, model))


def _compare_with_one_process(
    layout: Layout, method: str, trails: list[Trail], **options: Any
) -> None:
    chosen = METHODS[method]
    together = layout.together(frozen=chosen.frozen, **options)
    expected = train(chosen, together, together.backward)
    assert expected.skipped == 0
    if "max_norm" in chosen.options:
        assert max(expected.norms) > chosen.options["max_norm"], "nothing was clipped"
    for rank, trail in enumerate(trails):
        assert trail.skipped == 0
        assert trail.norms == pytest.approx(expected.norms, abs=1e-6)
        for zeros, wholes in zip(trail.zeros, expected.zeros, strict=True):
            for name, mask in zeros.items():
                whole = wholes[together.name_of(name, rank)]
                assert torch.equal(mask, layout.part(name, whole, rank)), name
        for name, value in trail.values.items():
            whole = expected.values[together.name_of(name, rank)]
            torch.testing.assert_close(value, layout.part(name, whole, rank), rtol=0, atol=1e-6)


@selection(
    "layout, method",
    [
        *(("two of two", each) for each in ("CrAM+", "ACDC around experts")),
        ("replicas", "ACDC"),
        *(("one and two", each) for each in ("CrAM, normalized", "CrAM of experts", "GMP")),
        *(("a rank each", each) for each in ("SAM", "GMP by layer")),
    ],
    NAMES,
    tuple(METHODS),
)
def test_a_step_is_that_of_one_process_with_all_experts(run: Run, layout: str, method: str) -> None:
    chosen = LAYOUTS[layout]
    _compare_with_one_process(chosen, method, run(chosen.ranks, _train, chosen, method, None))


@selection(
    "layout, method",
    [("two of two", "ACDC"), ("a rank each", "CrAM+")],
    EVEN,
    ("ACDC", "CrAM+", "GMP"),
)
def test_telling_the_wire_changes_no_step(run: Run, layout: str, method: str) -> None:
    chosen = LAYOUTS[layout]
    _compare_with_one_process(chosen, method, run(chosen.ranks, _train, chosen, method, EXACT))


def _zeros_of_ties(layout: Layout, method: str) -> Trail:
    model = layout.shard(tied=True)
    return _resting(method, model, partial(backward_on_rank, model))


RESTING = {
    "CrAM+": Method(make=CrAM, options={"sparsity": 0.5, "rho": 0.0}, steps=1),
    "ACDC": Method(make=ACDC, options={"schedule": PHASES, "target": 0.3}, steps=2),
}


def _resting(method: str, model: nn.Module, backward: Any) -> Trail:
    """Steps of no length: ties stay ties."""
    chosen = RESTING[method]
    return take_steps(chosen, model, chosen.around(model, lr=0.0), backward)


@selection(
    "layout, method",
    [
        *(("two of two", "ACDC"), ("replicas", "CrAM+")),
        *(("a rank each", "CrAM+"), ("one and two", "ACDC")),
    ],
    NAMES,
    tuple(RESTING),
)
def test_of_equal_magnitudes_those_of_the_first_ranks_stay(
    run: Run, layout: str, method: str
) -> None:
    chosen = LAYOUTS[layout]
    together = chosen.together(tied=True)
    names = together.names(in_blocks)
    expected = _expected_masks(together, names, 0.5 if method == "CrAM+" else 0.3)
    for rank, trail in enumerate(run(chosen.ranks, _zeros_of_ties, chosen, method)):
        for name, mask in trail.zeros[-1].items():
            whole = expected.get(together.name_of(name, rank))
            assert (whole is not None) == in_blocks(name)
            if whole is not None:
                assert torch.equal(~mask, chosen.part(name, whole, rank)), name


# Gradients that are not finite


@torch.no_grad()
def _poisoned(layout: Layout, method: str, base_has: str, bad_call: int) -> dict[str, Any]:
    """One bad gradient of the last sub-mesh's experts, on one of its ranks, in a pass of CrAM's
    first step or in a step of another method."""
    model = layout.shard()
    options = {} if method == "CrAM" else METHODS[method].options
    make = METHODS[method].make
    chosen = Method(make=make, options=options, prunes="experts", base_has=base_has)
    optimizer, calls = chosen.around(model), 0
    parameters = dict(model.named_parameters())

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = backward_on_rank(model, calls)
        if calls == bad_call and dist.get_rank() == layout.owners[-1][0]:
            model.blocks[1].expert.up.bias.grad.to_local()[0] = math.nan
        return loss

    for _ in range(1 if method == "CrAM" else bad_call):
        before = values_of(parameters)
        model.zero_grad()
        optimizer.step(closure)
    after = values_of(parameters)
    found = {
        "calls": calls,
        "skipped": optimizer.skipped_steps,
        "norm": optimizer.last_grad_norm,
        # A phase that begins then prunes all the same.
        "changed": [
            name
            for name, value in before.items()
            if not ((after[name] == value) | (after[name] == 0) & (method != "CrAM")).all()
        ],
    }
    model.zero_grad()
    optimizer.step(closure)
    return found | {"is trained later": not torch.equal(values_of(parameters)[BIAS], after[BIAS])}


BIAS = "blocks.0.expert.down.bias"


@selection(
    "layout, base_has, method, bad_call",
    [
        *(("two of two", "all", "CrAM", 1), ("two of two", "experts", "CrAM", 2)),
        *(("a rank each", "experts", "CrAM", 1), ("a rank each", "experts", "ACDC", 1)),
        *(("one and two", "experts", "GMP", 1), ("replicas", "experts", "CrAM", 1)),
    ],
    NAMES,
    ("all", "experts"),
    ("CrAM", "ACDC", "GMP"),
    (1, 2),
)
def test_a_bad_gradient_of_one_expert_skips_the_step_on_all_ranks(
    run: Run, layout: str, base_has: str, method: str, bad_call: int
) -> None:
    chosen = LAYOUTS[layout]
    for found in run(chosen.ranks, _poisoned, chosen, method, base_has, bad_call):
        assert found["calls"] == bad_call
        assert found["skipped"] == 1
        assert not math.isfinite(found["norm"])
        assert found["changed"] == []
        assert found["is trained later"]


# The wire


WIDE: dict[str, Any] = {"width": 32, "hidden": 24}
NEAREST: dict[str, Any] = {"bucket_size": 64, "rounding": "nearest"}
CONFIGS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "budget": {**NEAREST, "budget": 5.5},
    "learned": {**NEAREST, "weight_bits": 4, "grad_bits": 4}
    | {"levels": "learned", "level_steps": (1, 2)},
}


@torch.no_grad()
def _on_the_wire(layout: Layout, config: dict[str, Any], method: str) -> dict[str, Any]:
    model = layout.shard(**WIDE)
    handle = qsdp.install(model, qsdp.QSDPConfig(**{**NEAREST, **config}))
    chosen = METHODS[method]
    optimizer = chosen.around(model)
    optimizer.share_support(handle.set_support)
    with handle.measuring():
        trail = take_steps(chosen, model, optimizer, partial(backward_on_rank, model))
    errors, parameters = handle.errors(), dict(model.named_parameters())
    exact = {name: p.full_tensor() for name, p in parameters.items()}
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.unshard()
    pairs = [(name, p.detach().double(), exact[name]) for name, p in model.named_parameters()]
    squares = {
        name: [(sent - value).square().sum().item(), value.double().square().sum().item()]
        for name, sent, value in pairs
    }
    for module in groups:
        module.reshard()
    rows = [(row.name, row.weight, row.grad) for row in handle.report().rows]
    return {"errors": errors, "squares": squares, "trail": trail, "rows": rows}


@selection(
    "layout, config",
    [
        *(("two of two", "budget"), ("replicas", "learned"), ("a rank each", "8 bits")),
    ],
    EVEN,
    tuple(CONFIGS),
)
def test_the_wire_measures_all_experts(run: Run, layout: str, config: str) -> None:
    chosen, method = LAYOUTS[layout], "ACDC" if config == "8 bits" else "CrAM+"
    results = run(chosen.ranks, _on_the_wire, chosen, CONFIGS[config], method)
    for found in results:
        assert found["errors"] == results[0]["errors"]
        assert found["rows"] == results[0]["rows"]
        assert found["trail"].skipped == 0
    for name, errors in results[0]["errors"].items():
        # What one rank has alone does not travel.
        ranks = [own[0] for own in chosen.owners if len(own) > 1] if is_expert(name) else [0]
        parts = [results[rank]["squares"][name] for rank in ranks]
        error, square = (sum(column) for column in zip([0.0, 1e-60], *parts, strict=True))
        said = errors["weight"]
        assert math.sqrt(error / square) == pytest.approx(said or 0.0, rel=1e-4), name
        is_coded = in_blocks(name) or name == "head.weight"
        assert (said is not None) == (is_coded and bool(parts)), name
    if config != "8 bits":
        return
    together = chosen.together(**WIDE)
    trail = train(METHODS[method], together, together.backward)
    for rank, found in enumerate(results):
        for name, value in found["trail"].values.items():
            whole = trail.values[together.name_of(name, rank)]
            off = (value - chosen.part(name, whole, rank)).abs().sum()
            assert off <= 0.01 * value.numel(), name


@selection("layout", [("a rank each",)], EVEN)
def test_on_the_wire_exactly_so_many_weights_of_all_experts_are_pruned(
    run: Run, layout: str
) -> None:
    chosen = LAYOUTS[layout]
    trails = [r["trail"] for r in run(chosen.ranks, _on_the_wire, chosen, {}, "ACDC")]
    together = chosen.together(**WIDE)
    names = together.names(in_blocks)
    total = sum(together.get_parameter(name).numel() for name in names)
    zeros = sum(
        int((value == 0).sum())
        for rank, trail in enumerate(trails)
        for name, value in trail.values.items()
        if in_blocks(name) and chosen.counts(name, rank)
    )
    assert zeros == round(0.9 * total)


def _install_on_uneven_submeshes() -> str:
    try:
        qsdp.install(LAYOUTS["one and two"].shard())
    except RuntimeError as error:
        return str(error)
    return "installed"


def test_the_wire_refuses_submeshes_of_different_sizes(run: Run) -> None:
    said = (
        r"rank 1 has the group of blocks\.0\.expert\..* over 2 ranks but rank 0 has it over 1 ranks"
    )
    for message in run(3, _install_on_uneven_submeshes):
        assert re.match(said, message)


# Checkpoints


def _saved(layout: Layout, with_optimizer: bool, folder: Path) -> tuple[str, Path | None]:
    model = layout.shard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    try:
        save(folder, 1, model, optimizer, {})
    except (ValueError, RuntimeError) as error:
        return str(error), latest(folder)
    return "saved", latest(folder)


@selection(
    "layout, with_optimizer",
    [
        *(("two of two", True), ("replicas", False)),
        *(("a rank each", False), ("one and two", True)),
    ],
    NAMES,
    (False, True),
)
def test_a_checkpoint_that_would_keep_one_of_two_experts_is_refused_by_name(
    run: Run, tmp_path: Path, layout: str, with_optimizer: bool
) -> None:
    chosen = LAYOUTS[layout]
    results = run(chosen.ranks, _saved, chosen, with_optimizer, tmp_path)
    for message, checkpoint in results:
        assert message == results[0][0]
        assert "free some space" not in message
        assert "\n" not in message
        assert re.search(r"blocks\.\d\.expert\.(up|down)\.(weight|bias)", message), message
        assert checkpoint is None


# Tensor parallelism: what is on one axis of the mesh alone is equal along the other


class Rows(nn.Module):
    """Blocks whose last layer is cut by its input dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(ToyConfig()) for _ in range(2))

    def forward(self, x_BTC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return x_BTC.square().mean()


def _rows() -> Rows:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Rows()
    for block in model.blocks:
        down = block.get_submodule("mlp.down")
        for parameter in down.parameters():
            parameter.data.mul_(2)
    return model


def _row_backward(model: nn.Module, places: list[int], step: int) -> Tensor:
    total = torch.zeros(())
    for place in places:
        generator = torch.Generator().manual_seed(100 * step + place)
        loss = model(torch.randn(3, 4, 10, generator=generator)) / len(places)
        loss.backward()
        total += loss.detach()
    return total


ROW_METHODS = ("CrAM", "GMP by layer")


def _two_axes(folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = mesh.get_local_rank("dp")

    def sharded() -> Any:
        model = _rows()
        for block in model.blocks:
            plan = RowwiseParallel(input_layouts=Replicate())
            parallelize_module(block.get_submodule("mlp.down"), mesh["tp"], plan)
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    model = sharded()
    assert {len(p.device_mesh.shape) for p in model.parameters()} == {1, 2}
    _row_backward(model, [place], 0)
    norms = [global_grad_norm(model.parameters()), clip_grad_norm_(model.parameters(), 1e-3)]
    masks = _wholes(magnitude_masks, model)
    try:
        save(folder, 1, model, None, {})
    except (ValueError, RuntimeError) as error:
        masks["said"] = str(error)
    trails = {}
    for name in ROW_METHODS:
        model = sharded()
        trail = train(METHODS[name], model, partial(_row_backward, model, [place]))
        trail.values = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        trail.zeros = []
        trails[name] = trail
    return {"norms": norms, "masks": masks, "trails": trails}


def _wholes(find: Any, model: nn.Module) -> dict[str, Any]:
    """Masks of the parameters' own kind, made whole."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wholes = {}
    for name, mask in find(parameters, 0.5).items():
        values: Any = parameters[name]
        local = mask.to(torch.uint8)
        whole = local
        if isinstance(values, DTensor):
            whole = DTensor.from_local(
                local,
                values.device_mesh,
                values.placements,
                shape=values.shape,
                stride=values.stride(),
            ).full_tensor()
        wholes[name] = whole.bool()
    return wholes


def test_under_tensor_parallelism_what_is_equal_along_an_axis_counts_once(
    run: Run, tmp_path: Path
) -> None:
    results = run(4, _two_axes, tmp_path)
    plain = _rows()
    _row_backward(plain, [0, 1], 0)
    grads = [p.grad for p in plain.parameters() if p.grad is not None]
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    names, tensors = zip(*plain.named_parameters(), strict=True)
    total = sum(tensor.numel() for tensor in tensors)
    masks = top_k_masks([t.detach() for t in tensors], total - round(0.5 * total))
    trails = {}
    for method in ROW_METHODS:
        model = _rows()
        backward = partial(_row_backward, model, [0, 1])
        trails[method] = train(METHODS[method], model, backward)
    for found in results:
        assert found["norms"] == results[0]["norms"]
        assert found["norms"] == pytest.approx([norm, norm], rel=1e-5)
        assert "said" not in found["masks"]
        for name, mask in zip(names, masks, strict=True):
            assert torch.equal(found["masks"][name], mask), name
        for method, trail in found["trails"].items():
            assert trail.norms == pytest.approx(trails[method].norms, abs=1e-6)
            for name, value in trail.values.items():
                expected = trails[method].values[name]
                assert torch.equal(value == 0, expected == 0), (method, name)
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def _one_data_parallel_rank() -> list[float]:
    """Two ranks of tensor parallelism: what is on the mesh's other axis stands on one rank."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    cut, equal = torch.full((2, 3), 2.0), torch.full((4, 5), 3.0)
    both = nn.Parameter(DTensor.from_local(cut, mesh, [Shard(0), Shard(1)]))
    both.grad = both.detach().clone()
    one = nn.Parameter(DTensor.from_local(equal, mesh["dp"], [Shard(0)]))
    one.grad = one.detach().clone()
    masks = magnitude_masks({"both": both.detach(), "one": one.detach()}, 0.5)
    return [global_grad_norm([both, one]), *(float(mask.sum()) for mask in masks.values())]


def test_a_rank_alone_on_the_data_axis_shares_its_weights_with_the_others(run: Run) -> None:
    for norm, both, one in run(2, _one_data_parallel_rank):
        assert norm == pytest.approx(math.sqrt(2 * 6 * 4 + 20 * 9))
        assert (both, one) == (0, 16)


class _Student(nn.Module):
    """Beside it a frozen teacher, and a module that the first two ranks alone have."""

    def __init__(self, rank: int, teacher: float) -> None:
        super().__init__()
        self.student = nn.Linear(6, 6)
        self.teacher = nn.Linear(6, 6).requires_grad_(False)
        self.teacher.weight.data.mul_(teacher)
        if rank < 2:
            self.extra = nn.Linear(6, 6)


def _save_beside_a_teacher(folder: Path, differs: bool) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    rank = dist.get_rank()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Student(rank, 1.0 + (differs and rank // 2))
    for name, module in model.named_children():
        fully_shard(module, mesh=all_ranks() if name == "student" else mesh["gpu"])
    try:
        save(folder, 1, model, None, {})
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("differs", [False, True])
def test_copies_on_submeshes_are_saved_and_different_ones_are_not(
    run: Run, tmp_path: Path, differs: bool
) -> None:
    for text in run(4, _save_beside_a_teacher, tmp_path, differs):
        assert text.startswith("teacher.weight is sharded over some of" if differs else "saved")


def _compressed_beside_frozen(differs: bool) -> dict[str, int]:
    """How many values are zero in each shard, where the first block is frozen on each half."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    model = make_model(1)
    with torch.no_grad():
        model.blocks[0].requires_grad_(False)
        for parameter in model.blocks[0].parameters():
            parameter.mul_(3 if dist.get_rank() < 2 or not differs else 30)
    fully_shard(model.blocks[0], mesh=mesh["gpu"])
    fully_shard(model, mesh=all_ranks())
    with qsdp.compressed(model, 0.5) as chosen:
        return {name: int((p.to_local() == 0).sum()) for name, p in chosen.items()}


def test_frozen_copies_compete_once_and_different_ones_each(run: Run) -> None:
    plain = make_model(1)
    with torch.no_grad():
        for parameter in plain.blocks[0].parameters():
            parameter.mul_(3)
    with qsdp.compressed(plain, 0.5) as chosen:
        expected = {name: int((p == 0).sum()) for name, p in chosen.items()}
        total = sum(p.numel() for p in chosen.values())
        frozen = sum(p.numel() for name, p in chosen.items() if "blocks.0" in name)
    found = run(4, _compressed_beside_frozen, False)
    for name, count in expected.items():
        ranks = range(2) if "blocks.0" in name else range(4)
        assert sum(found[rank][name] for rank in ranks) == count
    zeros = sum(sum(each.values()) for each in run(4, _compressed_beside_frozen, True))
    assert zeros == round(0.5 * (total + frozen))


def _norm_of_experts_along_tp() -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"attn": nn.Linear(8, 8, bias=False), "expert": nn.Linear(8, 8)})
    model["expert"].weight.data.mul_(1 + mesh["tp"].get_local_rank())
    parallelize_module(model["attn"], mesh["tp"], RowwiseParallel())
    for module in model.values():
        fully_shard(module, mesh=mesh["dp"])
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    return qsdp.clip_grad_norm_(model.parameters(), 1e9)


def test_what_differs_along_an_axis_of_tensor_parallelism_still_gives_one_norm(run: Run) -> None:
    assert len({*run(4, _norm_of_experts_along_tp)}) == 1


def _save_after_a_validation(folder: Path) -> str:
    model = LAYOUTS["a rank each"].shard()
    with torch.no_grad():  # the root, which holds all that is shared, stays gathered
        model(torch.randn(4, 6))
    try:
        save(folder, 1, model, None, {})
    except ValueError as error:
        return str(error)
    return "saved"


def test_a_checkpoint_after_a_validation_is_refused_too(run: Run, tmp_path: Path) -> None:
    for text in run(2, _save_after_a_validation, tmp_path):
        assert "have one of their own under its name" in text


def _compress_what_one_rank_froze() -> str:
    model = LAYOUTS["a rank each"].shard()
    if dist.get_rank() == 0:
        model.blocks[0].expert.requires_grad_(False)
    try:
        with qsdp.compressed(model, 0.5):
            return "compressed"
    except RuntimeError as error:
        return str(error)


def test_experts_that_one_rank_froze_are_named(run: Run) -> None:
    for text in run(2, _compress_what_one_rank_froze):
        assert "rank 1 is at qsdp.compressed with trained ones blocks.0.expert." in text
