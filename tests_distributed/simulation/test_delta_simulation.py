"""Training whose gathers send changes alone equals its simulation, bit for bit.

The simulation keeps grids and no codes: what the ranks keep has no history that shows. Grids are
drawn anew every third step. AdamW moves weights out of grids of little room before that.
"""

from __future__ import annotations

import random
from typing import Any

from tests_distributed.support.running import Run, selection
from tests_distributed.support.trainings import (
    BF16,
    FP32,
    Case,
    assert_training_equals_its_simulation,
)

STEPS = 7


def _case(config: dict[str, Any] | None = None, **settings: Any) -> Case:
    delta = {"gather": "delta", "delta_redraw_every": 3, "weight_bits": 4}
    return Case(**settings, steps=STEPS, config=delta | (config or {}))


EIGHT = {"weight_bits": 8}
TWO_HOPS = {"reduce": "two-hop", "ranks_per_node": 2}
BY_NODE = TWO_HOPS | {"delta_codes": "node"}
REPLICAS: dict[str, Any] = {"ranks": 2, "replicas": 2}
QUANTIZED = REPLICAS | {"quantized_replicas": True}
CASES = {
    "alone": _case(ranks=1),
    "plain": _case(),
    "not resharded": _case(EIGHT, ranks=3, reshard=False, options={"frozen": True}),
    "as FSDP2 reshards": _case({"grad_bits": 4}, ranks=3, reshard=None, adamw=True),
    "empty shards": _case(
        {"weight_bucket_size": 16, "delta_room": 0.02, "delta_redraw_every": 50},
        ranks=4,
        adamw=True,
    ),
    "eight bits, small buckets": _case(
        EIGHT | {"bucket_size": 8, "delta_room": 0.05}, ranks=4, nested=False, adamw=True
    ),
    "large buckets": _case({"weight_bucket_size": 128, "rounding": "shift"}, ranks=3),
    "nearest": _case({"rounding": "nearest"}, ranks=3),
    "nearest at eight bits": _case(EIGHT | {"rounding": "nearest"}, options={"zeros": True}),
    "tied": _case({"embedding_bits": 4}, ranks=3, options={"tied": True}),
    "tied, one group": _case(EIGHT, nested=False, options={"tied": True}),
    "frozen and unused": _case(options={"frozen": True, "unused": True}, reshard=None),
    "most is frozen": _case(ranks=3, options={"trained": "*.mlp.up.weight"}),
    "most is frozen, re-computed": _case(
        options={"trained": "*.norm1.*", "checkpointing": True}, micro_batches=2
    ),
    "from zeros": _case(ranks=3, options={"zeros": True}, adamw=True),
    "accumulated": _case(EIGHT, micro_batches=3, reshard=None),
    "accumulated after reduce": _case(ranks=3, micro_batches=2, sync_every=True),
    "re-computed": _case(ranks=4, options={"checkpointing": True, "frozen": True}),
    "re-computed, re-entrant": _case(
        micro_batches=2, options={"checkpointing": True, "reentrant": True}
    ),
    "gathered in bf16": _case(ranks=3, dtypes=(BF16, FP32), options={"frozen": True}),
    "bf16": _case(EIGHT, ranks=4, dtypes=(BF16, BF16), options={"bf16": True, "tied": True}),
    "many widths": _case(
        {
            "policy": (
                *(("*.mlp.up.weight", 3), ("head.*", 16), ("embed.*", 32), ("*norm1*", 5)),
                *(("*.qkv.weight", (2, 4)), ("*.out.weight", (16, 3))),
            ),
        },
        ranks=3,
    ),
    "much room": _case({"delta_room": 1.0, "delta_redraw_every": 200}, adamw=True),
    "little room": _case({"delta_room": 2.0**-10, "delta_redraw_every": 1000}, ranks=3, adamw=True),
    "anew in each step": _case({"delta_redraw_every": 1}, options={"frozen": True}),
    "by columns and a large seed": _case(
        {"seed": 2**62 + 12345}, columns=True, nested=False, options={"hidden": 6}
    ),
    "all that is odd": _case(
        {"bucket_size": 16, "rounding": "stochastic", "grad_bits": 6},
        ranks=3,
        reshard=False,
        micro_batches=2,
        max_norm=0.1,
        options={"tied": True, "frozen": True, "unused": True, "checkpointing": True},
    ),
}
# What changes bits and layouts, and other topologies.
CASES |= {
    "sparse": _case(ranks=3, sparse=True, options={"frozen": True}),
    "sparse, at eight bits, gathered in bf16": _case(
        EIGHT | {"bucket_size": 16}, ranks=4, sparse=True, dtypes=(BF16, FP32), adamw=True
    ),
    "warm-up": _case({"warmup_steps": 3}, options={"frozen": True, "checkpointing": True}),
    "warm-up at 16 bits": _case(
        {"warmup_steps": 2, "warmup_bits": 16},
        ranks=3,
        micro_batches=2,
        sync_every=True,
        options={"frozen": True, "unused": True},
    ),
    "warm-up at eight bits": _case(
        {"warmup_steps": 3, "warmup_bits": 8, "rounding": "nearest"}, ranks=3, reshard=False
    ),
    "budget": _case({"budget": 4.5}, ranks=3, micro_batches=2, options={"frozen": True}),
    "budget behind a warm-up, sparse": _case(
        TWO_HOPS | {"budget": 5.0, "warmup_steps": 2, "warmup_bits": 6, "bucket_size": 64},
        ranks=4,
        sparse=True,
        options={"frozen": True},
    ),
    "two hops": _case(TWO_HOPS, ranks=4, adamw=True, options={"frozen": True}),
    "two hops, large buckets, in bf16": _case(
        EIGHT | TWO_HOPS, ranks=4, dtypes=(BF16, BF16), micro_batches=2
    ),
    "native replicas": _case(**REPLICAS, adamw=True, options={"frozen": True, "unused": True}),
    "native replicas, budget": _case({"budget": 4.5}, **REPLICAS, sync_every=True),
    "replicas": _case(**QUANTIZED, max_norm=0.1, options={"frozen": True}),
    "replicas, sparse, warm-up, budget": _case(
        {"budget": 5.0, "warmup_steps": 1, "bucket_size": 64}, **QUANTIZED, sparse=True
    ),
}
# What gradients learn: weights are coded as ever.
LEARNED = {"grad_bits": 3, "levels": "learned"}
CASES |= {
    "learned levels and a budget of gradients in two hops, behind a warm-up": _case(
        TWO_HOPS
        | LEARNED
        | {"local_grad_bits": 6, "level_steps": (1, 3, 6), "grad_budget": 6.0}
        | {"warmup_steps": 1, "warmup_bits": 5},
        ranks=4,
        adamw=True,
        options={"frozen": True, "tied": True},
    ),
    "learned levels, sparse": _case(
        LEARNED | {"level_steps": (2, 3)}, ranks=3, sparse=True, micro_batches=2
    ),
    "a budget of gradients and learned levels": _case(
        LEARNED | {"grad_budget": 4.5, "level_steps": (1, 4), "weight_bits": 3},
        ranks=3,
        options={"frozen": True},
    ),
    "a budget of gradients, replicas": _case(
        {"grad_budget": 5.0, "embedding_bits": 5, "warmup_steps": 2}, **QUANTIZED
    ),
}
# Codes that the ranks of a node keep between them.
CASES |= {
    "by node": _case(BY_NODE, ranks=4, adamw=True, options={"frozen": True, "unused": True}),
    "by node, re-computed, accumulated": _case(
        BY_NODE | {"bucket_size": 16, "grad_bits": 4},
        ranks=4,
        micro_batches=2,
        options={"tied": True, "checkpointing": True, "reentrant": True},
    ),
    "by node, at eight bits, in bf16, not resharded": _case(
        EIGHT | BY_NODE | {"rounding": "nearest"},
        ranks=4,
        reshard=False,
        dtypes=(BF16, BF16),
        micro_batches=2,
        sync_every=True,
    ),
    "by node, gathered in bf16, sparse": _case(
        BY_NODE | {"bucket_size": 16}, ranks=4, sparse=True, dtypes=(BF16, FP32), adamw=True
    ),
    "by node, behind a warm-up, budget, sparse": _case(
        BY_NODE | {"budget": 5.0, "warmup_steps": 2, "warmup_bits": 6, "bucket_size": 64},
        ranks=4,
        sparse=True,
        options={"frozen": True},
    ),
    "by node, many widths, as FSDP2 reshards": _case(
        BY_NODE
        | {"policy": (("*.mlp.up.weight", 3), ("head.*", 16), ("embed.*", 32), ("*norm1*", 5))},
        ranks=4,
        reshard=None,
        nested=False,
        options={"again": True},
    ),
}
# Of these, others have the same in other company.
HEAVY = {
    *("plain", "as FSDP2 reshards", "tied, one group", "frozen and unused", "re-computed"),
    *("large buckets", "much room", "anew in each step", "nearest at eight bits"),
    *("not resharded", "most is frozen", "tied", "accumulated", "eight bits, small buckets"),
    *("sparse", "warm-up at eight bits", "two hops", "two hops, large buckets, in bf16"),
    *("native replicas, budget", "replicas", "budget", "sparse, at eight bits, gathered in bf16"),
    *("warm-up", "little room", "re-computed, re-entrant", "gathered in bf16"),
    *("accumulated after reduce", "warm-up at 16 bits", "native replicas"),
    *("budget behind a warm-up, sparse", "by columns and a large seed"),
    *("learned levels, sparse", "a budget of gradients, replicas"),
    *("a budget of gradients and learned levels", "from zeros", "many widths"),
    "replicas, sparse, warm-up, budget",
    *(name for name in CASES if name.startswith("by node")),
}


@selection("name", [(name,) for name in CASES if name not in HEAVY], tuple(CASES))
def test_training_with_kept_codes_equals_the_simulation(run: Run, name: str) -> None:
    assert_training_equals_its_simulation(run, CASES[name], random.randrange(1 << 30))
