"""Waits grow by the factor in the environment."""

from __future__ import annotations

import pytest

from tests.support import patience


def test_waits_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(patience.VARIABLE, raising=False)
    assert patience.seconds() == 300
    monkeypatch.setenv(patience.VARIABLE, "2.5")
    assert patience.seconds() == 750
    assert patience.seconds(10) == 25


@pytest.mark.parametrize("text", ["", "long", "0", "-1", "nan", "inf"])
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(patience.VARIABLE, text)
    with pytest.raises(ValueError, match="QSDP_TEST_PATIENCE is"):
        patience.seconds()
