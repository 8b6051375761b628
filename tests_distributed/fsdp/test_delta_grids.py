"""``handle.grids()``: with them a training goes on as if it had not stopped, bit for bit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

import qsdp
from qsdp.sparsity.local_shards import local_shard
from tests_distributed.support.delta import (
    bits_of,
    decoded,
    installed,
    masks_of,
    num_kept_buckets,
    prune,
    same_on_all_ranks,
    sent_while,
    support,
    take_sgd_step,
)
from tests_distributed.support.going_on import Setting, Training
from tests_distributed.support.helpers import full_state, make_model, shard
from tests_distributed.support.running import Run, selection

AT, END = 3, 6
"""After how many steps a training is saved, and how many it takes."""

# --- going on -----------------------------------------------------------------------------------

SETTINGS = {
    "plain": Setting(),
    "frozen and tied": Setting(options={"frozen": True, "tied": True, "unused": True}),
    "under a support": Setting(share=0.4, options={"frozen": True}),
    "8 bits": Setting(config={"weight_bits": 8, "bucket_size": 64, "delta_room": 0.02}),
    "nearest": Setting(config={"rounding": "nearest", "weight_bits": 3, "embedding_bits": 4}),
    "a budget": Setting(
        config={"budget": 5.0, "weight_bits": 8, "bucket_size": 64},
        options={"width": 32, "hidden": 32, "num_layers": 1},
    ),
    "after a warm-up": Setting(config={"warmup_steps": 2}),
    "in a warm-up": Setting(config={"warmup_steps": 4}),
    "bf16": Setting(options={"bf16": True}),
    "replicas": Setting(replicas=2),
}


def _going_on(name: str) -> dict[str, bool]:
    """Whether trainings that go on from saved ones are as one that was never asked to save."""
    setting = SETTINGS[name]
    plain = Training(setting)
    plain.take(range(AT))
    expected = plain.take(range(AT, END))
    asked = Training(setting)
    asked.take(range(AT))
    saved = asked.save()
    asked.validate()
    validated = asked.save()
    found = {"asked": asked.take(range(AT, END))}
    for what, source in (("resumed", saved), ("resumed after a validation", validated)):
        found[what] = Training(setting, source).take(range(AT, END))
    late = Training(setting, saved)
    late.validate()  # the first gather is another one than training's
    found["resumed before a validation"] = late.take(range(AT, END))
    return {what: each == expected for what, each in found.items()}


WAYS = {
    f"{name}, on {ranks}": (ranks, name)
    for name, setting in SETTINGS.items()
    for ranks in ((1, 2, 3, 4) if setting.replicas == 1 else (4,))
}


@selection("way", [("under a support, on 3",)], WAYS)
def test_a_training_that_goes_on_with_its_grids_is_as_if_it_had_not_stopped(
    run: Run, way: str
) -> None:
    ranks, name = WAYS[way]
    for found in run(ranks, _going_on, name):
        assert found == dict.fromkeys(found, True)


def _without_grids(name: str, empty: bool) -> tuple[int, int, list[float], bool]:
    """Buckets that are drawn after a load without grids, all there are, losses; alike on all?"""
    begun = Training(SETTINGS[name])
    begun.take(range(AT))
    saved = begun.save()
    training = Training(SETTINGS[name])
    training.load(saved, grids=False)
    if empty:
        training.handle.load_grids({})
    assert all(v.to_local().isnan().all() for n, v in _minima(training.handle.grids()))
    model, handle = training.model, training.handle
    names = [name for name, _ in model.named_parameters()]
    buckets = num_kept_buckets(model, training.masks, 16, names)
    redrawn = sent_while(handle, lambda: decoded(model))["redrawn_buckets"]
    losses = [loss for (loss, _) in training.take(range(AT, END))[: END - AT] for loss in loss]
    return redrawn, buckets, losses, same_on_all_ranks(decoded(model))


def _minima(grids: dict[str, Tensor]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in grids.items() if name.endswith(".min")]


@selection(("name", "empty"), [("under a support", True)], ("plain", "under a support"), (0, 1))
def test_without_grids_all_are_drawn_anew(run: Run, name: str, empty: bool) -> None:
    for redrawn, buckets, losses, same in run(3, _without_grids, name, empty):
        assert redrawn == buckets
        assert same
        assert all(map(math.isfinite, losses))


# --- what they are ------------------------------------------------------------------------------


def _looked_at(replicas: int) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """What is odd of the grids; what they are of each parameter; how many buckets are expected."""
    odd: list[str] = []
    training = Training(Setting(replicas=replicas, options={"frozen": True}))
    model, handle = training.model, training.handle
    ranks = dist.get_world_size() // replicas
    coded = [row.name for row in handle.report().rows if "bits" in row.weight]
    buckets = {}
    for name in coded:
        rows, *rest = model.get_parameter(name).shape
        buckets[name] = -(-(-(-rows // ranks) * math.prod(rest)) // 16)
    before = handle.grids()
    odd += [f"{n} before" for n, value in _minima(before) if not value.to_local().isnan().all()]
    training.take(range(2))
    grids = handle.grids()
    forms = {}
    for key, value in grids.items():
        assert isinstance(value, DTensor)
        name, _, kind = key.rpartition(".")
        parameter: Any = model.get_parameter(name)
        placements = [
            Shard(0) if isinstance(each, Shard) else Replicate() for each in parameter.placements
        ]
        forms[key] = str(value.dtype)
        if value.device_mesh != parameter.device_mesh or [*value.placements] != placements:
            odd.append(f"{key} lies as {value.placements} on {value.device_mesh}")
        if value.to_local().shape != (buckets[name],) or value.shape != (ranks * buckets[name],):
            odd.append(f"{key} has {value.to_local().shape} of {value.shape}")
        used = -(-local_shard(parameter).values.numel() // 16)
        local = value.to_local()[:used]
        if kind == "epoch" and not ((local >= 0) & (local <= 2)).all():
            odd.append(f"{key} has {local}")
        if kind != "epoch" and not local.isfinite().all():
            odd.append(f"{key} is not finite")
    # They are copies.
    expected = bits_of(grids)
    for value in grids.values():
        value.to_local().fill_(7)
    if bits_of(handle.grids()) != expected:
        odd.append("not copies")
    # What the next gather draws anyway is as if it had not been drawn.
    masks = {n: m for n, m in masks_of(model, 0.5).items() if n.startswith("blocks.1.mlp")}
    if replicas == 1:
        prune(model, masks)
        handle.set_support(support(model, masks))
        for key, value in _minima(handle.grids()):
            if not local_shard(model.get_parameter(key.removesuffix(".min"))).values.numel():
                continue
            is_anew = bool(value.to_local().isnan().all())
            if is_anew != key.startswith("blocks.1.mlp"):
                odd.append(f"{key} after a support")
        decoded(model)
        for key, value in _minima(handle.grids()):
            kept = masks.get(key.removesuffix(".min"))
            if kept is None:
                continue
            used, local = -(-int(kept.sum()) // 16), value.to_local()
            epochs = local_shard(handle.grids()[key.replace(".min", ".epoch")]).values
            scales = local_shard(handle.grids()[key.replace(".min", ".scale")]).values
            rest = (local[used:].isnan(), scales[used:] == 0, epochs[used:] == 0)
            if local[:used].isnan().any() or not all(each.all() for each in rest):
                odd.append(f"{key} under a support: {local}")
    return odd, forms, buckets


GRIDS = {"4 ranks": (4, 1), "2 ranks": (2, 1), "two replicas": (4, 2)}


@selection("way", [], GRIDS)
def test_grids_are_tensors_that_are_sharded_as_their_parameters(run: Run, way: str) -> None:
    ranks, replicas = GRIDS[way]
    for odd, forms, buckets in run(ranks, _looked_at, replicas):
        assert odd == []
        kinds = {"min": "torch.float32", "scale": "torch.float32", "epoch": "torch.int32"}
        assert forms == {f"{n}.{kind}": of for n in buckets for kind, of in kinds.items()}


OTHERS: dict[str, tuple[dict[str, Any], bool]] = {
    "the same": ({}, False),
    "again": ({}, False),
    "bits": ({"weight_bits": 5}, False),
    "buckets": ({"bucket_size": 32}, False),
    "rounding": ({"rounding": "nearest"}, False),
    "a support": ({}, True),
    "another gather": ({"gather": "once"}, False),
}


def _layouts(names: tuple[str, ...]) -> dict[str, tuple[Any, list[bool]]]:
    """The layout in each wire's state, and whether it is as it should be."""
    found = {}
    for name in names:
        config, is_masked = OTHERS[name]
        wire = {"weight_bits": 4, "bucket_size": 16, "gather": "delta", **config}
        model = shard(make_model(1, num_layers=1))
        handle = qsdp.install(model, qsdp.QSDPConfig(**wire))
        if is_masked:
            masks = masks_of(model, 0.5)
            prune(model, masks)
            handle.set_support(support(model, masks))
        before = handle.state_dict()
        take_sgd_step(model, 0, 0.0)
        state = json.loads(json.dumps(handle.state_dict()))
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, state)
        # As a version that kept no grids has left it.
        handle.load_state_dict({name: value for name, value in state.items() if name != "grids"})
        handle.load_grids({})
        take_sgd_step(model, 1, 0.0)
        has_grids = bool(handle.grids()) == (wire["gather"] == "delta")
        same = all(each == state for each in everyones)
        found[name] = (state["grids"], [same, before["grids"] == state["grids"], has_grids])
    return found


def test_the_state_tells_layouts_of_grids_apart(run: Run) -> None:
    found, *_ = run(2, _layouts, tuple(OTHERS))
    found |= {"ranks": run(3, _layouts, ("the same",))[0]["the same"]}
    assert all(as_it_should == [True] * 3 for _, as_it_should in found.values())
    texts = {name: layout for name, (layout, _) in found.items()}
    assert texts.pop("again") == texts["the same"]
    assert texts["another gather"] == ""
    assert all(isinstance(layout, str) for layout in texts.values())
    assert len({*texts.values()}) == len(texts)


def _alone() -> dict[str, Tensor]:
    model, handle = installed(1, {"weight_bits": 4})
    take_sgd_step(model, 0, 0.1)
    return handle.grids()


def test_one_rank_has_no_grids(run: Run) -> None:
    assert run(1, _alone) == [{}]


# --- refusals -----------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], dict[str, Any]]
UP = "blocks.0.mlp.up.weight"


def _put(key: str, change: Callable[[Any], Any]) -> Change:
    return lambda grids: grids | {key: change(grids[key])}


def _like(value: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(local, value.device_mesh, value.placements)


CHANGES: dict[str, Change] = {
    "one is missing": lambda grids: {n: v for n, v in grids.items() if n != f"{UP}.scale"},
    "all of one are missing": lambda grids: {n: v for n, v in grids.items() if UP not in n},
    "an odd name": lambda grids: grids | {"blocks.0.mlp.upp.weight.min": grids[f"{UP}.min"]},
    "another dtype": _put(f"{UP}.epoch", lambda v: _like(v, v.to_local().long())),
    "another shape": _put(f"{UP}.min", lambda v: _like(v, v.to_local().repeat(2))),
    "a scale of inf": _put(f"{UP}.scale", lambda v: _like(v, v.to_local() + math.inf)),
    "no DTensor": _put(f"{UP}.min", lambda v: v.to_local()),
    "no tensor": _put(f"{UP}.min", lambda v: v.to_local().tolist()),
}
ONE_ALONE = ("none", *CHANGES)


def _refused(odd: int | None) -> tuple[dict[str, tuple[str, str]], list[bool], float]:
    """By change what is said of it (which error, and its text); how training goes on after it."""
    training = Training(Setting())
    training.take(range(2))
    handle, model = training.handle, training.model
    state = handle.state_dict()
    said = {}
    for name in CHANGES if odd is None else ONE_ALONE:
        handle.load_state_dict(state)
        given = grids = training.save().grids
        if odd is None or odd == dist.get_rank():
            given = {} if name == "none" else CHANGES[name](grids)
        try:
            handle.load_grids(given)
            said[name] = ("nothing", "")
        except (ValueError, RuntimeError) as error:
            kind = "ValueError" if isinstance(error, ValueError) else "RuntimeError"
            said[name] = (kind, str(error))
    same = []
    for step in range(2, 4):
        take_sgd_step(model, step, 0.1)
        same.append(same_on_all_ranks(decoded(model)))
    weights, exact = decoded(model), full_state(model)
    near = max(float((weights[n] - v).abs().max() / v.abs().max()) for n, v in exact.items())
    return said, same, near


@pytest.mark.parametrize("odd", [None, 0, pytest.param(1, marks=pytest.mark.heavy)])
def test_grids_that_are_not_those_of_the_model_are_refused_on_all_ranks(
    run: Run, odd: int | None
) -> None:
    everyone = run(2, _refused, odd)
    for rank, (said, same, near) in enumerate(everyone):
        for name, (error, sentence) in said.items():
            where = f"{name}: {sentence}"
            assert error == "ValueError" or (odd is not None and error == "RuntimeError"), where
            assert re.fullmatch(r"[^\n]+[^.\n]\.", sentence), where
            if odd is None:
                assert "grids" in sentence, where
                assert sentence == everyone[0][0][name][1]
            elif name != "none" and rank != odd:
                assert f"rank {odd}" in sentence, where
        assert same == [True, True]
        assert near < 0.35


def _given_to_another_wire() -> list[str]:
    grids = _grids()
    said = []
    for gather in ("once", "twice"):
        handle = qsdp.install(shard(make_model(1)), qsdp.QSDPConfig(gather=gather))
        assert handle.grids() == {}
        handle.load_grids({})
        with pytest.raises(ValueError) as raised:
            handle.load_grids(grids)
        said.append(str(raised.value))
    _, handle = installed(1, {"weight_bits": 4})
    handle.remove()
    for call in (handle.grids, lambda: handle.load_grids(grids)):
        with pytest.raises(RuntimeError, match="removed"):
            call()
    return said


def _grids() -> dict[str, Tensor]:
    training = Training(Setting())
    training.take(range(1))
    return training.handle.grids()


def test_a_wire_that_keeps_no_codes_takes_no_grids(run: Run) -> None:
    for said in run(2, _given_to_another_wire):
        for sentence in said:
            assert "delta" in sentence
            assert re.fullmatch(r"[^\n]+[^.\n]\.", sentence)


# --- on disk ------------------------------------------------------------------------------------


def _through_dcp(folder: str) -> bool:
    """Whether a training that goes on from DCP's files is as one that was left alone."""
    setting = Setting(options={"tied": True})
    plain = Training(setting)
    plain.take(range(AT))
    saved = plain.save()
    weights = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    dcp.save({"model": weights, "grids": saved.grids}, checkpoint_id=folder)
    expected = plain.take(range(AT, END))
    again = Training(setting)
    found: dict[str, Any] = {
        "model": {name: p.detach() for name, p in again.model.named_parameters()},
        "grids": again.handle.grids(),
    }
    dcp.load(found, checkpoint_id=folder)
    again.optimizer.load_state_dict(saved.optimizer)
    again.handle.load_state_dict(json.loads(saved.state))
    again.handle.load_grids(found["grids"])
    return again.take(range(AT, END)) == expected


@pytest.mark.heavy
def test_grids_go_through_dcp(run: Run, tmp_path: Path) -> None:
    assert run(3, _through_dcp, str(tmp_path / "checkpoint")) == [True] * 3
