"""What is printed as one line leaves in one write, however the stream is buffered."""

from __future__ import annotations

import io
import sys

import pytest

from qsdp.common.printing import print_error


class Unbuffered(io.StringIO):
    """A stream that tells of each write, as standard error of ``python -u`` makes each."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        if text:
            self.writes.append(text)
        return super().write(text)


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Unbuffered()
    monkeypatch.setattr(sys, "stderr", stream)
    print_error("error: this is one line.")
    assert stream.writes == ["error: this is one line.\n"]
