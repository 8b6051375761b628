"""What .ci/run prints at its end: phases, the slowest tests of all suites, threads of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import patience

PROGRAM = Path(__file__).parents[2] / ".ci" / "where_time_went.py"


def printed(*arguments: Path) -> list[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=patience.seconds(), check=True
    )
    return done.stdout.splitlines()


def suite(path: Path, **seconds: float) -> None:
    cases = "".join(
        f'<testcase classname="tests.{path.stem}" name="{name}" time="{time}"/>'
        for name, time in seconds.items()
    )
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")


def test_it_prints_phases_and_the_slowest_tests_of_all_suites(tmp_path: Path) -> None:
    (tmp_path / "phases").write_text("7 set up\n61 all tests\n")
    suite(tmp_path / "a.xml", **{f"fast{i}": 0.1 for i in range(20)}, slow=3.25)
    suite(tmp_path / "b.xml", slowest=12)
    (tmp_path / "pool-1.json").write_text(json.dumps({"max_threads": 9}))
    lines = printed(tmp_path, tmp_path / "phases")
    assert lines[:4] == [
        "seconds  phase",
        "      7  set up",
        "     61  all tests",
        "     68  together",
    ]
    assert lines[5] == "seconds  test (the 15 slowest of 22)"
    assert lines[6:8] == ["   12.0  tests.b::slowest", "    3.2  tests.a::slow"]
    assert lines[8].startswith("    0.1  tests.a::fast")
    assert len(lines) == 6 + 15 + 2
    assert lines[-1] == "threads in a pool worker, at most: 9"


def test_it_prints_what_there_is_where_a_check_ended_early(tmp_path: Path) -> None:
    (tmp_path / "phases").write_text("3 set up\n")
    assert printed(tmp_path, tmp_path / "phases")[1:3] == ["      3  set up", "      3  together"]
