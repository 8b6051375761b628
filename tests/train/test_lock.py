"""A folder of results is one run's while it runs: by its lock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qsdp.train import lock
from qsdp.train.lock import hold

pytestmark = pytest.mark.usefixtures("world_of_one")

FRESH = {"job": None, "host": "elsewhere", "pid": 4711, "process": None, "id": "theirs"}


def ended_process() -> dict[str, Any]:
    """What a process of this machine, which has ended, wrote into its lock."""
    code = "import json; from qsdp.train import lock; print(json.dumps(lock._owner()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    threads = threading.active_count()
    said = rf"in use by .*process {os.getpid()} .*--take-over"
    with hold(tmp_path, takes_over=False), pytest.raises(ValueError, match=said):
        hold(tmp_path, takes_over=False).__enter__()
    with hold(tmp_path, takes_over=False):
        pass
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_lock_of_another_machine_is_free_when_it_is_of_this_job_or_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in lock._JOB_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(FRESH | {"job": f"{name}=7"}))
    for mine in ("8", "none", ""):
        monkeypatch.setenv(name, mine)
        with pytest.raises(ValueError, match=f"process 4711 on elsewhere, {name}=7"):
            hold(tmp_path, takes_over=False).__enter__()
    monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold(tmp_path, takes_over=False):
        pass
    path.write_text(json.dumps(FRESH))
    silent = time.time() - lock.MISSED * lock.HEARTBEAT_S - 1
    os.utime(path, (silent, silent))
    with hold(tmp_path, takes_over=False):
        pass


def test_the_lock_of_a_process_that_has_ended_is_free_at_once(tmp_path: Path) -> None:
    owner = ended_process()
    if owner["process"] is None:
        pytest.skip("there is no /proc here")
    (tmp_path / "run.lock").write_text(json.dumps(owner))
    with hold(tmp_path, takes_over=False):
        pass
    # Its number may have been given to another one since.
    (tmp_path / "run.lock").write_text(json.dumps(owner | {"pid": os.getpid()}))
    with hold(tmp_path, takes_over=False):
        pass


def test_a_job_does_not_take_its_folder_from_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # two runs in one allocation
    with hold(tmp_path, takes_over=False), pytest.raises(ValueError, match="in use"):
        hold(tmp_path, takes_over=False).__enter__()


def test_who_was_taken_over_hears_of_it_and_leaves_the_lock_alone(tmp_path: Path) -> None:
    with hold(tmp_path, takes_over=False) as first:
        (tmp_path / "run.lock").unlink()
        first.check()  # nobody else has it
        assert lock.holder(tmp_path) == first.owner
        second = hold(tmp_path, takes_over=True)
        with second as theirs:
            with pytest.raises(ValueError, match="taken over by another run"):
                first.check()
            first.end()
            theirs.check()


def test_a_lock_that_cannot_be_read_for_once_goes_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **options: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with hold(tmp_path, takes_over=False) as first, hold(tmp_path, takes_over=True) as theirs:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", refuse)
            first.check()
        theirs.check()
        with pytest.raises(ValueError, match="taken over"):
            first.check()


def test_who_was_taken_over_ends_also_when_the_other_one_has_ended(tmp_path: Path) -> None:
    with hold(tmp_path, takes_over=False) as first:
        with hold(tmp_path, takes_over=True):
            pass
        for _ in range(2):  # also many starts later
            with hold(tmp_path, takes_over=False):
                pass
            with pytest.raises(ValueError, match="taken over by another run"):
                first.check()


@pytest.mark.parametrize(("start", "is_free"), [("1", True), ("0", False)])
def test_of_one_allocation_an_earlier_start_alone_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, is_free: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", start)
    (tmp_path / "run.lock").write_text(json.dumps(FRESH | {"job": "SLURM_JOB_ID=7", "start": "0"}))
    expected = nullcontext() if is_free else pytest.raises(ValueError, match="in use")
    with expected, hold(tmp_path, takes_over=False):
        pass


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    with hold(tmp_path, takes_over=False):
        os.utime(tmp_path / "run.lock", (1, 1))
        deadline = time.monotonic() + 60
        while (tmp_path / "run.lock").stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 1}'])
def test_a_damaged_lock_keeps_nobody_out_for_long(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)  # it may be that of a run which is about to write it
    with pytest.raises(ValueError, match="in use by a"):
        hold(tmp_path, takes_over=False).__enter__()
    os.utime(path, (1, 1))
    with hold(tmp_path, takes_over=False):
        pass
