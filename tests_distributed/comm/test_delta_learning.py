"""What gradients learn beside kept weights, levels and bits, leaves these as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests_distributed.support.delta import (
    installed,
    num_kept_buckets,
    sent_while,
    take_sgd_step,
)
from tests_distributed.support.running import Run

CONFIG: dict[str, Any] = {"weight_bits": 4, "grad_bits": 3, "grad_budget": 4.5, "bucket_size": 64}
CONFIG |= {"levels": "learned", "level_steps": (1, 3), "delta_redraw_every": 1 << 30}
STEPS = 5
UP = "blocks.0.mlp.up.weight"


def _learned() -> tuple[list[dict[str, int]], int, list[dict[str, tuple[str, str]]], Any, bool]:
    """What each step of weights that stay sends; all buckets; bits before each; the state.

    And whether that is taken over without the levels that weights had beside another gather.
    With other bits of weights it is refused; levels of rotated gradients are left out.
    """
    model, handle = installed(2, CONFIG, width=32, hidden=32)
    counts, travels = [], []
    for step in range(STEPS):
        counts.append(sent_while(handle, partial(take_sgd_step, model, step, 0.0)))
        travels.append({row.name: (row.weight, row.grad) for row in handle.report().rows})
    state = handle.state_dict()
    odd = {**state, "bits": state["bits"] | {UP: [5, 4]}}
    with pytest.raises(ValueError, match=rf"bits of {UP} are \[5, 4\]: give \[4, 2 to 8\]"):
        handle.load_state_dict(odd)
    others = [[UP, kind, 4, *torch.linspace(0, 1, 16).tolist()] for kind in ("weight", "kept")]
    handle.load_state_dict({**state, "levels": [*others, *state["levels"]]})
    buckets = num_kept_buckets(model, {}, 64, [name for name, _ in model.named_parameters()])
    is_taken_over = handle.state_dict() == state
    rotated = state["request"] | {"grad_rotation": "hadamard"}
    handle.load_state_dict({**state, "request": rotated})
    is_taken_over &= not handle.state_dict()["levels"]
    return counts, buckets, travels, state, is_taken_over


def test_what_gradients_learn_draws_no_weight_anew(run: Run) -> None:
    for counts, buckets, travels, state, is_taken_over in run(2, _learned):
        assert [each["redrawn_buckets"] for each in counts] == [buckets] + [0] * (STEPS - 1)
        assert [each["changed_codes"] for each in counts] == [0] * STEPS
        still = {each["gather_sent_bytes"] for each in counts[2:]}
        assert len(still) == 1
        assert still.pop() < counts[0]["gather_sent_bytes"] / 4
        first, *later = travels
        weights, grads = ([{n: both[i] for n, both in t.items()} for t in travels] for i in (0, 1))
        assert weights == [weights[0]] * STEPS
        assert grads[1:] == [grads[1]] * (STEPS - 1)
        assert first[UP] == ("4 bits", "3 bits")
        assert len({grad for _, grad in later[0].values() if "bits" in grad}) > 1
        assert state["bits"][UP][0] == 4
        assert {kind for _, kind, *_ in state["levels"]} == {"grad"}
        assert is_taken_over
