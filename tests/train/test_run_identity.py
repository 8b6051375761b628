"""What makes a run the same run: all settings that change its numbers, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from qsdp.train.config import TrainConfig, setting_types

# Another value of every setting; what changes no number is in the second.
CHANGES: dict[str, Any] = {
    "model": "tiny",
    "steps": 2001,
    "batch_size": 7,
    "grad_accum": 2,
    "seq_len": 65,
    "lr": 2e-3,
    "min_lr": 1e-5,
    "warmup_steps": 99,
    "weight_decay": 0.2,
    "beta2": 0.9,
    "clip_grad": 2.0,
    "seed": 1,
    "precision": "bf16",
    "replicas": 2,
    "eval_batches": 9,
    "backend": "gloo",
    "one_shot": ("0.9",),
    "prunable": "*.up.*",
    "sam": True,
    "gmp": True,
    "acdc": True,
    "qsdp_bits": 4,
    "qsdp_weight_bits": 4,
    "qsdp_grad_bits": 5,
    "qsdp_budget": 4.0,
    "qsdp_grad_budget": 4.0,
}
NO_CHANGES: dict[str, Any] = {
    "out": "elsewhere",
    "resume": "none",
    "keep": 3,
    "max_bad_steps": 3,
    "save_every": 7,
    "save_async": True,
    "eval_every": 9,
    "tensorboard": True,
    "timeout_s": 9,
    "take_over": True,
    "data": "else",
    "tokenizer": "byte",
}
OF_A_METHOD: dict[str, tuple[str, Any]] = {
    "cram_sparsity": ("cram", (0.5,)),
    "cram_targets": ("cram", ("2:4",)),
    "cram_rho": ("cram", 0.1),
    "cram_normalize": ("cram", True),
    "cram_plus": ("cram", False),
    "cram_sparse_grad": ("cram", False),
    "cram": ("qsdp_bits", 4),
    "acdc_sparsity": ("acdc", 0.5),
    "acdc_target": ("acdc", "2:4"),
    "acdc_warmup": ("acdc", 9),
    "acdc_phase": ("acdc", 50),
    "acdc_last_dense": ("acdc", 99),
    "acdc_last_sparse": ("acdc", 99),
    "eval_every": ("acdc", 7),
    "gmp_sparsity": ("gmp", 0.8),
    "gmp_initial": ("gmp", 0.1),
    "gmp_start": ("gmp", 9),
    "gmp_every": ("gmp", 9),
    "gmp_end": ("gmp", 900),
    "sam_rho": ("sam", 0.1),
}
OF_THE_WIRE: dict[str, Any] = {
    "qsdp_embedding_bits": 7,
    "qsdp_local_grad_bits": 7,
    "qsdp_bucket_size": 64,
    "qsdp_weight_bucket_size": 64,
    "qsdp_rounding": "nearest",
    "qsdp_levels": "learned",
    "qsdp_grad_rotation": "hadamard",
    "qsdp_policy": "*=5",
    "qsdp_warmup_steps": 9,
    "qsdp_gather": "once",
    "qsdp_reduce": "flat",
    "qsdp_ranks_per_node": 2,
}


DELTA: dict[str, Any] = {"qsdp_bits": 8, "qsdp_gather": "delta"}
OF_DELTA: dict[str, Any] = {"qsdp_delta_room": 0.1, "qsdp_delta_redraw_every": 50}


def test_every_setting_is_part_of_a_run_or_changes_no_number() -> None:
    told = {*CHANGES, *NO_CHANGES, *OF_A_METHOD, *OF_THE_WIRE}
    # These need two others, which are told.
    told |= {"qsdp_level_steps", "qsdp_warmup_bits", "qsdp_errors", "qsdp_delta_codes", *OF_DELTA}
    told |= {"text_field"}  # of data with fields: the test below
    assert told == setting_types().keys()
    plain, coded = TrainConfig(), TrainConfig.of(qsdp_bits=4)
    pairs = [(plain, {name: value}) for name, value in CHANGES.items()]
    pairs += [(coded, {name: value}) for name, value in OF_THE_WIRE.items()]
    kept = coded.changed(qsdp_gather="delta")
    pairs += [(coded, {"qsdp_gather": "delta"}), *((kept, {n: v}) for n, v in OF_DELTA.items())]
    for name, (method, value) in OF_A_METHOD.items():
        chosen = {method: value if method == "qsdp_bits" else True}
        pairs.append((TrainConfig.of(**chosen), {name: True if name == "cram" else value}))
    for config, change in pairs:
        other = config.changed(**change)
        assert other.identity != config.identity, change
        assert other.out_dir != config.out_dir, change
    for name, value in NO_CHANGES.items():
        assert plain.changed(**{name: value}).identity == plain.identity, name
    assert coded.changed(qsdp_errors=True).identity == coded.identity
    assert kept.changed(qsdp_delta_codes="node").identity == kept.identity
    for name in ("data", "tokenizer"):
        assert plain.changed(**{name: "else"}).out_dir != plain.out_dir


def test_a_field_of_the_data_tells_runs_apart_only_where_it_is_given() -> None:
    records = TrainConfig.of(data="a.jsonl", tokenizer="byte")
    assert records.data.identity.keys() == {"data", "tokenizer"}, "as folders were named before"
    body, title = (records.changed(text_field=field) for field in ("body", "title"))
    assert body.data.identity == records.data.identity | {"text_field": "body"}
    assert len({config.out_dir for config in (records, body, title)}) == 3
    assert records.identity == body.identity == title.identity


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"qsdp_bits": 8}, {"qsdp_weight_bits": 8, "qsdp_grad_bits": 8}),
        ({"qsdp_bits": 8}, {"qsdp_bits": 8, "qsdp_gather": "twice", "qsdp_reduce": "auto"}),
        ({"qsdp_bits": 4}, {"qsdp_bits": 4, "qsdp_grad_rotation": "none"}),
        (DELTA, DELTA | {"qsdp_delta_room": 0.25, "qsdp_delta_redraw_every": 200}),
        ({"cram": True, "cram_sparsity": (0.5,)}, {"cram": True, "cram_targets": ("0.5",)}),
        ({"acdc": True}, {"acdc": True, "acdc_target": "0.9"}),
        ({"acdc": True}, {"acdc": True, "acdc_warmup": 200}),
        ({"lr": 1e-3}, {"lr": 1e-3, "min_lr": 1e-4}),
    ],
)
def test_the_same_run_may_be_spelled_in_several_ways(one: Any, other: Any) -> None:
    assert TrainConfig.of(**one).identity == TrainConfig.of(**other).identity


@pytest.mark.parametrize("gather", ["twice", "once"])
def test_a_run_is_told_of_flags_that_came_later_only_where_it_has_them(gather: str) -> None:
    later = {*OF_DELTA, "qsdp_weight_bucket_size", "qsdp_grad_rotation"}
    run = TrainConfig.of(qsdp_bits=8, qsdp_gather=gather)
    assert later.isdisjoint(run.identity)
    assert {"qsdp_rounding", "qsdp_bucket_size"} <= run.identity.keys()  # unset, as these are
    assert run.changed(qsdp_weight_bucket_size=64).identity["qsdp_weight_bucket_size"] == 64


def test_what_auto_comes_to_is_the_same_run_as_if_given_by_hand() -> None:
    auto = TrainConfig.of(qsdp_bits="auto")
    chosen = auto.resolved({"qsdp_bits": 4, "qsdp_gather": "once"})
    by_hand = TrainConfig.of(qsdp_bits=4, qsdp_gather="once")
    assert chosen.identity == by_hand.identity
    assert (chosen.out_dir, chosen.qsdp) == (auto.out_dir, by_hand.qsdp)
    assert auto.resolved({"qsdp_bits": None}).identity == TrainConfig().identity
    folders = {str(c.out_dir) for c in (auto, by_hand, TrainConfig(), TrainConfig.of(qsdp_bits=8))}
    assert len(folders) == 4
