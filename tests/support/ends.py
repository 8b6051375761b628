"""Ways in which a run ends early, and what it leaves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.commands.train import main


def shorten_ends(patch: pytest.MonkeyPatch) -> None:
    """Let runs end without a sample and plots, which take most of the time of a few steps."""
    patch.setattr("qsdp.train.validate.Evaluator.sample", lambda evaluator: None)
    patch.setattr("qsdp.train.after_training.write_plots", lambda *_: [])


class Cut(BaseException):
    """What ends a run without a word."""


def interrupted(monkeypatch: pytest.MonkeyPatch, flags: list[str], at_step: int) -> None:
    """Run until the step before is done, then end."""
    from qsdp.train import loop

    take = loop.train_step

    def step(job: Any, **options: Any) -> Any:
        if job.steps_done + 1 == at_step:
            raise Cut
        return take(job, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        cut(flags)


def cut(flags: list[str]) -> None:
    with pytest.raises(Cut):
        main(flags)
    dist.destroy_process_group()  # which would have ended with the process


@contextlib.contextmanager
def told(place: Any, name: str, call: int, *numbers: signal.Signals) -> Iterator[None]:
    """Inside, these signals come in the middle of the given call, from 1 on, of a function."""
    function, calls = getattr(place, name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        for number in numbers if calls == call else ():
            signal.raise_signal(number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, interrupted)
        yield
    assert calls >= call


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    reader = checkpoint.TensorReader(path)
    names = ("embed.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.down.weight")
    return {name: reader.read(name) for name in names}
