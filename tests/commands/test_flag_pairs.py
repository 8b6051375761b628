"""No flag of launch/train_gpt.py is taken and ignored: of every pair both count, or it is refused.

``SAMPLES`` has every flag, and ``EXCLUDED`` says which pairs of samples nobody can have at once.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import nn

from qsdp.codec.segment_table import Field
from qsdp.comm.group_plan import Parameter, Plan
from qsdp.config import QSDPConfig
from qsdp.methods.acdc.optimizer import ACDC as ACDC_
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP as GMP_
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.methods.registry import METHODS
from qsdp.methods.sam.optimizer import SAM as SAM_
from qsdp.train import make_optimizer
from qsdp.train.config import TrainConfig, setting_types
from qsdp.train.loop import learning_rate

Values = dict[str, Any]

ADAMW: Values = {}
CRAM, ACDC, GMP, SAM = ({method: True} for method in ("cram", "acdc", "gmp", "sam"))
WIRE: Values = {"qsdp_bits": 4}
LEARNED = WIRE | {"qsdp_levels": "learned"}
DELTA = WIRE | {"qsdp_gather": "delta"}

# By name, what is given, and the company that it cannot do without; a run has 2000 steps.
SAMPLES: dict[str, tuple[Values, Values]] = {
    "model": ({"model": "mini"}, ADAMW),
    "data": ({"data": "text.txt"}, ADAMW),
    "tokenizer": ({"tokenizer": "byte"}, ADAMW),
    "text_field": ({"text_field": "body"}, {"data": "a.jsonl"}),
    "steps": ({"steps": 3000}, ADAMW),
    "batch_size": ({"batch_size": 3}, ADAMW),
    "grad_accum": ({"grad_accum": 2}, ADAMW),
    "seq_len": ({"seq_len": 32}, ADAMW),
    "lr": ({"lr": 0.01}, ADAMW),
    "min_lr": ({"min_lr": 1e-5}, ADAMW),
    "warmup_steps": ({"warmup_steps": 60}, ADAMW),
    "warmup_steps to the end": ({"warmup_steps": 5000}, ADAMW),
    "weight_decay": ({"weight_decay": 0.2}, ADAMW),
    "beta2": ({"beta2": 0.9}, ADAMW),
    "clip_grad": ({"clip_grad": 0.5}, ADAMW),
    "seed": ({"seed": 3}, ADAMW),
    "precision": ({"precision": "bf16"}, ADAMW),
    "replicas": ({"replicas": 2}, ADAMW),
    "out": ({"out": "here"}, ADAMW),
    "eval_every": ({"eval_every": 7}, ADAMW),
    "eval_batches": ({"eval_batches": 3}, ADAMW),
    "save_every": ({"save_every": 9}, ADAMW),
    "keep": ({"keep": 3}, ADAMW),
    "max_bad_steps": ({"max_bad_steps": 3}, ADAMW),
    "resume": ({"resume": "none"}, ADAMW),
    "save_every 0": ({"save_every": 0}, ADAMW),
    "save_async": ({"save_async": True}, ADAMW),
    "backend": ({"backend": "gloo"}, ADAMW),
    "timeout_s": ({"timeout_s": 77}, ADAMW),
    "one_shot": ({"one_shot": ("2:4",)}, ADAMW),
    "one_shot none": ({"one_shot": ("none",)}, ADAMW),
    "tensorboard": ({"tensorboard": True}, ADAMW),
    "take_over": ({"take_over": True}, ADAMW),
    "prunable": ({"prunable": "blocks.*"}, ADAMW),
    "cram": (CRAM, ADAMW),
    "cram_sparsity": ({"cram_sparsity": (0.3,)}, CRAM),
    "cram_targets": ({"cram_targets": ("2:4",)}, CRAM),
    "cram_targets of bits": ({"cram_targets": ("4bit",)}, CRAM),
    "cram_rho": ({"cram_rho": 0.1}, CRAM),
    "cram_rho 0": ({"cram_rho": 0.0}, CRAM),
    "cram_normalize": ({"cram_normalize": True}, CRAM),
    "cram_plus": ({"cram_plus": False}, CRAM),
    "cram_sparse_grad": ({"cram_sparse_grad": False}, CRAM),
    "acdc": (ACDC, ADAMW),
    "acdc_sparsity": ({"acdc_sparsity": 0.3}, ACDC),
    "acdc_target": ({"acdc_target": "2:4"}, ACDC),
    "acdc_warmup": ({"acdc_warmup": 30}, ACDC),
    "acdc_phase": ({"acdc_phase": 30}, ACDC),
    "acdc_last_dense": ({"acdc_last_dense": 40}, ACDC),
    "acdc_last_sparse": ({"acdc_last_sparse": 40}, ACDC),
    "acdc_warmup to the last phases": ({"acdc_warmup": 1500}, ACDC),
    "gmp": (GMP, ADAMW),
    "gmp_sparsity": ({"gmp_sparsity": 0.8}, GMP),
    "gmp_initial": ({"gmp_initial": 0.3}, GMP),
    "gmp_start": ({"gmp_start": 30}, GMP),
    "gmp_every": ({"gmp_every": 30}, GMP),
    "gmp_end": ({"gmp_end": 1700}, GMP),
    "one pruning": ({"gmp_start": 700, "gmp_end": 700}, GMP),
    "sam": (SAM, ADAMW),
    "sam_rho": ({"sam_rho": 0.1}, SAM),
    "qsdp_bits": (WIRE, ADAMW),
    "qsdp_bits auto": ({"qsdp_bits": "auto"}, ADAMW),
    "qsdp_bits without codes": ({"qsdp_bits": 16}, ADAMW),
    "qsdp_weight_bits": ({"qsdp_weight_bits": 5}, ADAMW),
    "qsdp_grad_bits": ({"qsdp_grad_bits": 5}, ADAMW),
    "qsdp_embedding_bits": ({"qsdp_embedding_bits": 5}, WIRE),
    "qsdp_local_grad_bits": ({"qsdp_local_grad_bits": 6}, WIRE),
    "qsdp_bucket_size": ({"qsdp_bucket_size": 64}, WIRE),
    "qsdp_weight_bucket_size": ({"qsdp_weight_bucket_size": 32}, WIRE),
    "qsdp_rounding": ({"qsdp_rounding": "dither"}, WIRE),
    "qsdp_rounding to nearest": ({"qsdp_rounding": "nearest"}, WIRE),
    "qsdp_levels": ({"qsdp_levels": "learned"}, WIRE),
    "qsdp_grad_rotation": ({"qsdp_grad_rotation": "hadamard"}, WIRE),
    "qsdp_level_steps": ({"qsdp_level_steps": (7,)}, LEARNED),
    "qsdp_policy": ({"qsdp_policy": "blocks.0.*=6/5"}, WIRE),
    "qsdp_budget": ({"qsdp_budget": 5.0}, ADAMW),
    "qsdp_grad_budget": ({"qsdp_grad_budget": 5.0}, ADAMW),
    "qsdp_warmup_steps": ({"qsdp_warmup_steps": 3}, WIRE),
    "qsdp_warmup_bits": ({"qsdp_warmup_bits": 8}, WIRE | {"qsdp_warmup_steps": 3}),
    "qsdp_gather": ({"qsdp_gather": "once"}, WIRE),
    "qsdp_gather delta": ({"qsdp_gather": "delta"}, WIRE),
    "qsdp_delta_room": ({"qsdp_delta_room": 0.1}, DELTA),
    "qsdp_delta_redraw_every": ({"qsdp_delta_redraw_every": 50}, DELTA),
    "qsdp_delta_codes": ({"qsdp_delta_codes": "node"}, DELTA),
    "qsdp_reduce": ({"qsdp_reduce": "two-hop"}, WIRE),
    "qsdp_reduce flat": ({"qsdp_reduce": "flat"}, WIRE),
    "qsdp_ranks_per_node": ({"qsdp_ranks_per_node": 2}, WIRE),
    "qsdp_errors": ({"qsdp_errors": True}, WIRE),
}


def is_beside_bits(values: Values) -> bool:
    """Whether a sample is of the wire, and not of the bits that are given for all of it."""
    return all(name.startswith("qsdp_") and name != "qsdp_bits" for name in values)


NEEDS_CODES = ("bucket_size", "rounding", "rounding to nearest", "errors", "local_grad_bits")
NEEDS_CODES += ("levels", "level_steps", "warmup_bits", "weight_bucket_size", "grad_rotation")
WITH_DELTA = ("qsdp_gather delta", "qsdp_delta_room", "qsdp_delta_redraw_every")
WITH_DELTA += ("qsdp_delta_codes",)

# Of two methods all pairs exclude each other; beside these:
EXCLUDED = {
    frozenset(pair)
    for pair in (
        ("cram_sparsity", "cram_targets"),
        ("cram_sparsity", "cram_targets of bits"),
        ("cram_sparse_grad", "cram_targets of bits"),
        ("cram_normalize", "cram_rho 0"),
        ("acdc_sparsity", "acdc_target"),
        ("acdc_phase", "acdc_warmup to the last phases"),
        ("gmp_initial", "one pruning"),
        ("gmp_every", "one pruning"),
        ("prunable", "one_shot none"),
        ("min_lr", "warmup_steps to the end"),
        ("save_async", "save_every 0"),
        ("qsdp_local_grad_bits", "qsdp_reduce flat"),
        *((f"qsdp_{name}", "qsdp_bits without codes") for name in NEEDS_CODES),
        *((delta, "qsdp_bits without codes") for delta in WITH_DELTA),
        *((delta, "qsdp_gather") for delta in WITH_DELTA),
        ("qsdp_delta_codes", "qsdp_reduce flat"),
        ("qsdp_budget", "qsdp_grad_budget"),
        *((name, "qsdp_bits auto") for name, (own, _) in SAMPLES.items() if is_beside_bits(own)),
        ("replicas", "qsdp_bits auto"),
        ("data", "text_field"),  # text has no fields
    )
}

Pair = tuple[str, str]


def pairs() -> Iterator[Pair]:
    """All pairs of samples that do not give one flag twice."""
    for one, other in itertools.combinations(SAMPLES, 2):
        if SAMPLES[one][0].keys().isdisjoint(SAMPLES[other][0]):
            yield one, other


def given(*names: str) -> Values:
    """What the samples give, with their company."""
    values: Values = {}
    for part in (1, 0):
        for name in names:
            values |= SAMPLES[name][part]
    return values


def is_excluded(one: str, other: str) -> bool:
    chosen = given(one, other)
    return sum(method in chosen for method in METHODS) > 1 or frozenset((one, other)) in EXCLUDED


class Ranks:
    """What a plan asks of a process group."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 1


@cache
def travels(wire: QSDPConfig, least_bits: int = 0) -> list[list[int]]:
    """What the codec reads of the tables that it is given, and what is rotated before."""
    names = {"embed.weight": True, "blocks.0.up.weight": False, "blocks.1.up.weight": False}
    parameters = [
        Parameter(
            name=name,
            index=i,
            shape=torch.Size([16, 8]),
            dtype=torch.float32,
            shard_dim=0,
            weight_bits=weight_bits,
            grad_bits=grad_bits,
            keeps_bits=wire.keeps_bits(name, is_embedding),
            why="",
        )
        for i, (name, is_embedding) in enumerate(names.items())
        for weight_bits, grad_bits in [wire.bits_of(name, is_embedding)]
    ]
    plan, places = Plan(parameters, 0, cast(Any, Ranks()), wire), (0, 1, 2)
    layouts = [plan.gather(places, least_bits)]
    layouts += [
        plan.reduce(places, torch.float32, least_bits, is_local=is_local)
        for is_local in (False, *([True] if wire.reduce != "flat" else []))
    ]
    rows: list[list[int]] = [
        [*row, segment.rotates_in]
        for layout in layouts
        for row, segment in zip(layout.tables[0].tolist(), layout.segments, strict=True)
    ]
    for row in rows:
        if row[Field.BITS] == 0:
            row[Field.BUCKET] = row[Field.ROUNDING] = 0
    return rows


def wired(wire: QSDPConfig) -> list[Any]:
    """What is read of the wire."""
    rows, warm = travels(wire), travels(wire, wire.least_warmup_bits)
    has_codes = wire.has_budget or any(row[Field.BITS] for row in rows)
    is_learned = any(row[Field.LEVELS] >= 0 for row in rows)
    is_delta = wire.gather == "delta"
    is_warmed = wire.warmup_steps > 0 and (warm != rows or wire.has_budget)
    return [
        *(rows, has_codes, wire.gather, wire.reduce, wire.ranks_per_node, wire.seed),
        *(wire.budget_of(is_grad=is_grad) for is_grad in (False, True)),
        *(is_learned, wire.learning_steps if is_learned else ()),
        (wire.room, wire.redraw_every, wire.delta_codes) if is_delta else (),
        (wire.warmup_steps, warm) if is_warmed else None,
    ]


@cache
def masked(schedule: ACDCSchedule | GMPSchedule) -> list[float]:
    steps = range(0, schedule.steps, 10)
    if isinstance(schedule, ACDCSchedule):
        return [float(schedule.is_compressed(step)) for step in steps]
    return [schedule.sparsity_at(step) for step in steps]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Values]:
    """What optimizers are made with, which are not."""
    calls: list[Values] = []

    def make(name: str) -> Callable[..., None]:
        return lambda *_, **options: calls.append({"made": name} | options)

    def adamw(groups: Any, **options: Any) -> None:
        calls.append({"decays": [group["weight_decay"] for group in groups]} | options)

    for optimizer in (SAM_, CrAM, ACDC_, GMP_):
        home = sys.modules[optimizer.__module__]
        monkeypatch.setattr(home, optimizer.__name__, make(optimizer.__name__))
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    return calls


MODEL = nn.Linear(1, 1)


def seen(values: Values, made: list[Values]) -> list[Any]:
    """All that a run of these settings reads of them."""
    config = TrainConfig.of(**values)
    made.clear()
    make_optimizer.make_optimizer(config, cast(Any, MODEL))
    optimizers = [dict(options) for options in made]
    for options in optimizers:
        if "schedule" in options:
            options["schedule"] = masked(options["schedule"])
    targets = config.compression.targets
    rates = [learning_rate(config, step) for step in (0, 50, 99, 731, config.run.steps - 1)]
    wire = None if config.qsdp is None else wired(config.qsdp)
    has_errors = wire is not None and wire[1] and config.wire.qsdp_errors
    names = """model data tokenizer steps batch_size grad_accum seq_len seed precision replicas
        eval_every eval_batches save_every save_async keep resume backend timeout_s tensorboard
        take_over clip_grad max_bad_steps out text_field"""
    return [
        *(config.settings()[name] for name in names.split()),
        *(
            config.method.PASSES,
            targets,
            config.wire.qsdp_bits == "auto",
            optimizers,
            rates,
            wire,
            has_errors,
            config.compression.patterns if targets else None,
        ),
    ]


def test_every_flag_has_a_sample() -> None:
    assert {name for values, _ in SAMPLES.values() for name in values} == setting_types().keys()
    names = {name for pair in EXCLUDED for name in pair}
    assert names <= SAMPLES.keys()


def mistake(one: str, other: str, made: list[Values]) -> str | None:
    """What is wrong with a pair, if anything."""
    try:
        both = seen(given(one, other), made)
    except ValueError as error:
        is_told = re.fullmatch(r"--[^\n]*: [^\n]*[^.]\.", str(error)) is not None
        return None if is_excluded(one, other) and is_told else f"{one}, {other}: {error}"
    if is_excluded(one, other):
        return f"{one} and {other} are taken together"
    for name, rest in ((one, other), (other, one)):
        without = SAMPLES[name][1] | given(rest)
        is_company = SAMPLES[name][0].items() <= without.items()
        if not is_company and seen(without, made) == both:
            return f"{name} does nothing beside {rest}"
    return None


def test_of_every_pair_of_flags_both_count_or_it_is_refused(made: list[Values]) -> None:
    found = (mistake(one, other, made) for one, other in pairs())
    assert [*filter(None, found)] == []
