"""One run a folder of results: a lock that tells whose the folder is, and a heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsdp.common.folder_locks import locked_folder
from qsdp.common.json_files import write_json

HEARTBEAT_S = 30.0
MISSED = 4
"""Heartbeats after which a run is taken for dead: its machine has gone, or it stands still."""
_NAME = "run.lock"
_JOB_VARIABLES = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


class Lock:
    """OUT/run.lock, from ``hold``.

    A run whose process has ended holds nothing. Of a process on another machine nobody knows: it
    holds nothing if its heart has stopped, or if it was an earlier start of the same job, by
    SLURM_JOB_ID and SLURM_RESTART_COUNT, or by torchrun's id. So a job that is started again after
    it was preempted finds its folder free. A lock that was taken over is left behind, for who lost
    it.
    """

    def __init__(self, path: Path, owner: Mapping[str, Any]) -> None:
        self._path, self.owner = path, dict(owner)
        self._has_ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="qsdp-lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise ValueError if another run has taken the folder over."""
        found = _read(self._path)
        if found is None:  # somebody has removed it, and nobody else has held the folder since
            with contextlib.suppress(OSError):
                write_json(self._path, self.owner)
        elif found and found != self.owner:  # what cannot be read now will be looked at again
            raise ValueError(
                f"{self._path.parent} was taken over by {_told(found)}, so this run ends, and what "
                "it has not saved is not written there."
            )

    def end(self) -> None:
        """Let go of the folder. Who was taken over is to find whose it was."""
        self._has_ended.set()
        self._heart.join()
        if _read(self._path) != self.owner:
            return
        with contextlib.suppress(OSError):  # the lock of a process that has ended binds nobody
            if self.owner["took_over"]:
                write_json(self._path, self.owner | {"has_ended": True})
            else:
                self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._has_ended.wait(HEARTBEAT_S):
            try:
                if _read(self._path) == self.owner:
                    os.utime(self._path)
            except OSError:
                continue  # a file system that is away for a while must not end a run


@contextlib.contextmanager
def hold(out: Path, *, takes_over: bool) -> Iterator[Lock]:
    """Hold the lock of a training run's folder ``out`` inside.

    Args:
        out: The folder of results.
        takes_over: Whether to take it from a run that is alive: that one ends when it saves next.

    Raises:
        ValueError: Another run holds it.
    """
    path, owner = out / _NAME, _owner()
    with locked_folder(out):  # of two that find it free at once the second finds the first
        found = _read(path) or {}
        if path.exists() and not takes_over and not _is_free(path, found, owner):
            _refuse(path)
        # Who lost it may still be there, many starts later.
        is_lost = found.get("took_over", False) or not _has_ended(found)
        owner["took_over"] = bool(found) and is_lost
        write_json(path, owner)
    lock = Lock(path, owner)
    try:
        yield lock
    finally:
        lock.end()


def holder(out: Path) -> dict[str, Any] | None:
    """Whose the folder ``out`` is, as ``Lock.owner`` says; None if it is free."""
    return _read(out / _NAME)


def _owner() -> dict[str, Any]:
    return {
        "id": secrets.token_hex(8),
        "job": _job_id(),
        "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": process_id(os.getpid()),
    }


def _job_id() -> str | None:
    """What the scheduler or torchrun calls this job, the same when it is started again."""
    named = {name: os.environ.get(name, "") for name in _JOB_VARIABLES}
    # Without a name torchrun says "none".
    return next((f"{n}={v}" for n, v in named.items() if v not in ("", "none")), None)


def process_id(pid: object) -> str | None:
    """What tells a process of this machine from all that had its number before; None without it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {namespace} {fields[18]}"  # when it started


def _is_free(path: Path, found: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    """Whether whoever holds the lock cannot be there any more."""
    if _has_ended(found):
        return True
    if _is_here(found):
        return False
    # An allocation may run several at once: of Slurm's an earlier start alone is another's end.
    is_same_job = owner["job"] is not None and found.get("job") == owner["job"]
    is_same_job &= "SLURM" not in str(owner["job"]) or found.get("start") != owner["start"]
    return is_same_job or _run_silent_for_s(path) > MISSED * HEARTBEAT_S


def _has_ended(found: Mapping[str, Any]) -> bool:
    """Whether a run is known to have ended: it said so, or its process was of this machine."""
    is_gone = _is_here(found) and process_id(found.get("pid")) != found["process"]
    return bool(found.get("has_ended")) or is_gone


def _is_here(found: Mapping[str, Any]) -> bool:
    """Whether a process is, or was, of this machine."""
    own = process_id(os.getpid())
    return own is not None and str(found.get("process")).split()[:2] == own.split()[:2]


def _refuse(path: Path) -> None:
    raise ValueError(
        f"{path.parent} is in use by {_told(_read(path))}: wait for its end, give another --out, "
        "or end that run by --take-over."
    )


def _told(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "a run that its lock does not name"
    job = f", {found['job']}" if found.get("job") else ""
    return f"another run (process {found.get('pid')} on {found.get('host')}{job})"


def _run_silent_for_s(path: Path) -> float:
    """How long ago the run with the lock last beat, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".now-") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says: nothing, if it cannot be read; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
