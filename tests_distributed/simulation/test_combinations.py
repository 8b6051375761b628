"""Every combination of what the wire can do equals its simulation, bit for bit.

``make test`` runs a selection in which every pair of settings occurs. All combinations:

    python -m pytest tests_distributed/simulation/test_combinations.py --all-combinations
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest

from tests_distributed.support.running import Run
from tests_distributed.support.trainings import (
    BF16,
    FP32,
    Case,
    assert_training_equals_its_simulation,
)

FACTORS: dict[str, tuple[Any, ...]] = {
    "gather": ("twice", "once", "delta"),
    "reduce": ("flat", "two-hop", "hsdp"),
    "checkpointing": (False, True),
    "micro_batches": (1, 2),
    "dtype": ("fp32", "bf16"),
    "ranks": (2, 3, 4),
    "sparse": (False, True),
}
Combination = tuple[Any, ...]
RANKS_PER_NODE = 2


def _exists(combination: Combination) -> bool:
    """Nodes and replicas are of two ranks each; two replicas of them take four."""
    setting = dict(zip(FACTORS, combination, strict=True))
    possible = {"flat": (2, 3, 4), "two-hop": (2, 4), "hsdp": (4,)}
    return setting["ranks"] in possible[setting["reduce"]]


def _pairs(combination: Combination) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(zip(FACTORS, combination, strict=True), 2))


def _pairwise(combinations: Iterable[Combination]) -> list[Combination]:
    """Greedy: always the combination with the most pairs that none before it has."""
    rest = list(combinations)
    missing = set().union(*map(_pairs, rest))
    chosen = []
    while missing:
        best = max(rest, key=lambda combination: len(_pairs(combination) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


ALL = [c for c in itertools.product(*FACTORS.values()) if _exists(c)]
PAIRWISE = _pairwise(ALL)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "combination" in metafunc.fixturenames:
        chosen = ALL if metafunc.config.getoption("--all-combinations") else PAIRWISE
        metafunc.parametrize("combination", chosen, ids=_name)


def test_the_selection_has_every_pair_and_is_small() -> None:
    settings = [(name, value) for name, values in FACTORS.items() for value in values]
    pairs = {(a, b) for a, b in itertools.combinations(settings, 2) if a[0] != b[0]}
    impossible = {
        (("reduce", "two-hop"), ("ranks", 3)),
        (("reduce", "hsdp"), ("ranks", 2)),
        (("reduce", "hsdp"), ("ranks", 3)),
    }
    covered = {
        (a, b)
        for chosen in PAIRWISE
        for a, b in itertools.combinations(zip(FACTORS, chosen, strict=True), 2)
    }
    assert covered == pairs - impossible
    assert set(PAIRWISE) <= set(ALL)
    assert len(PAIRWISE) <= 16
    assert len(ALL) == 3 * 2**4 * (3 + 2 + 1)


def test_a_combination_equals_its_simulation_bit_for_bit(
    run: Run, combination: Combination
) -> None:
    case = _case(**dict(zip(FACTORS, combination, strict=True)))
    assert_training_equals_its_simulation(run, case, random.randrange(1 << 30))


def _case(
    gather: str,
    reduce: str,
    checkpointing: bool,
    micro_batches: int,
    dtype: str,
    ranks: int,
    sparse: bool,
) -> Case:
    is_hsdp = reduce == "hsdp"
    return Case(
        ranks=ranks // 2 if is_hsdp else ranks,
        replicas=2 if is_hsdp else 1,
        quantized_replicas=is_hsdp,
        dtypes={"fp32": (FP32, FP32), "bf16": (BF16, BF16)}[dtype],
        micro_batches=micro_batches,
        sparse=sparse,
        options={"checkpointing": checkpointing, "frozen": True},
        config={
            "gather": gather,
            "reduce": "flat" if is_hsdp else reduce,
            "ranks_per_node": RANKS_PER_NODE,
            "weight_bits": 5,
            "grad_bits": 4,
            "warmup_steps": 1,
            "warmup_bits": 6,
        },
    )


def _name(combination: Combination) -> str:
    gather, reduce, checkpointing, micro_batches, dtype, ranks, sparse = combination
    recomputed = "recomputed" if checkpointing else "kept"
    support = "sparse" if sparse else "dense"
    return f"{gather}-{reduce}-{recomputed}-{micro_batches}-{dtype}-{ranks}-{support}"
