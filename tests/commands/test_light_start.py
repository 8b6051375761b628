"""What only reads flags answers at once: torch takes seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qsdp.__main__ import COMMANDS
from tests.support import patience
from tests.support.command_line import assert_is_one_sentence

pytestmark = pytest.mark.slow  # it starts programs
ROOT = Path(__file__).parents[2]
CODE = """
import runpy, sys
for flag, status in ("--help", 0), ("--no-such-flag", 2):
    sys.argv[1:] = [name, flag]
    try:
        runpy.run_module("qsdp", run_name="__main__")
    except SystemExit as stop:
        assert stop.code == status, stop
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_wrong_flag_import_no_torch(name: str) -> None:
    command = [sys.executable, "-c", f"name = {name!r}\n{CODE}"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=patience.seconds()
    )
    assert ended.returncode == 0, ended
    assert ended.stdout.startswith(f"usage: qsdp {name} [-h]"), ended
    assert_is_one_sentence(ended.stderr)
