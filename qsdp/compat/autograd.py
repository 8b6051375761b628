"""Backward passes of autograd: whether one runs, which, and what is called at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


def is_in_backward() -> bool:
    """Whether the calling thread runs inside an autograd backward pass."""
    return backward_number() != -1


def is_in_compiled_backward() -> bool:
    """Whether a backward pass runs that ``torch.compile`` has made a graph of."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # a second to import
    return compiled is not None and bool(compiled.in_compiled_autograd_region)


def backward_number() -> int:
    """Autograd's number of the backward pass that the calling thread runs in; -1 outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number


def after_backward(work: Callable[[], None]) -> None:
    """Call ``work`` where autograd ends the backward pass that the calling thread is in."""
    torch.autograd.Variable._execution_engine.queue_callback(work)
