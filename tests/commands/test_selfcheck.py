"""What ``qsdp selfcheck`` says of a machine on which something is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsdp.commands import hook_checks
from qsdp.ops import native

CHECKS = (
    *("codec", "changes", "all_gather", "all_to_all", "same_weights", "full_precision"),
    *("eight_bits", "kept_codes", "changed_codes"),
)


@pytest.mark.usefixtures("gloo_of_one")
def test_an_error_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(world: Any) -> str:
        raise RuntimeError("[/gloo/pair.cc:5] \x1b[2J closed")

    for name in CHECKS:
        monkeypatch.setattr(
            hook_checks, f"check_{name}", fails if name == "codec" else lambda _: "x"
        )
    monkeypatch.setenv("COLUMNS", "200")
    world: Any = SimpleNamespace(size=1, backend="gloo", device=torch.device("cpu"), is_main=True)
    monkeypatch.setattr(native, "_told", set())
    assert hook_checks.run_all_checks(world) == 1
    assert native._told, "what serves the codec stands in the table"
    printed = capsys.readouterr().out
    assert "rank 0: [/gloo/pair.cc:5] \ufffd[2J closed" in printed
    assert (printed.count("failed"), printed.count("holds")) == (1, len(CHECKS) - 1)
