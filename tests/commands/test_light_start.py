"""What only reads flags answers at once: torch takes seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience

pytestmark = pytest.mark.slow  # it starts programs
ROOT = Path(__file__).parents[2]
CODE = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as stop:
    print("ended with", stop.code)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
@pytest.mark.parametrize("program", ["train_gpt", "compress", "evaluate"])
def test_help_and_a_wrong_flag_import_no_torch(program: str, flag: str) -> None:
    command = [sys.executable, "-c", CODE, str(ROOT / "launch" / f"{program}.py"), flag]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patience.seconds())
    status = 0 if flag == "--help" else 2
    assert ended.stdout.endswith(f"ended with {status}\nFalse\n"), ended
