"""What tests of the trainer's command line share: a small run, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qsdp.commands.train import main


def refused(
    flags: list[str],
    capfd: pytest.CaptureFixture[str],
    command: Callable[[list[str]], None] = main,
) -> str:
    """The one line that ``command``, by default the trainer's, prints on standard error."""
    with pytest.raises(SystemExit) as stop:
        command(flags)
    assert stop.value.code == 2
    printed = capfd.readouterr()
    assert_is_one_sentence(printed.err)
    return printed.err


def assert_is_one_sentence(text: str) -> None:
    assert re.fullmatch(r"error: \S.*[^.]\.\n", text), text
    assert "Traceback" not in text


def small_run(folder: Path, *flags: str) -> list[str]:
    return [
        *("--data", str(folder / "text.txt"), "--out", str(folder / "out"), "--steps", "2"),
        *("--model", "tiny", "--seq-len", "8", "--batch-size", "2", "--eval-batches", "1", *flags),
    ]
