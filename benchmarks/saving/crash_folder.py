"""What a folder of results holds, what is done to it from outside, and whether anything is lost."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.saving.crash_jobs import Ended
from qsdp import checkpoint
from qsdp.common.user_errors import quoted

# Of a line of metrics, what two runs of one command have in common.
SAME = ("step", "loss", "lr", "grad_norm", "tokens")
HOWS = ("a flipped byte", "truncated", "missing")
_GOING_ON = re.compile(r"Going on from .*step-(\d{8,})")
Line = tuple[Any, ...]


class Unavailable(RuntimeError):
    """This machine or this user cannot do what a row needs."""


@dataclass
class Row:
    """One thing that was done to a run, and what came of it."""

    what: str
    when: str = ""
    ended: str = ""
    said: str = ""
    hangs: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Steps or lines that are gone, and nobody was told."""
    differs: list[str] = field(default_factory=list)
    """Weights that are not those of the undisturbed run."""
    wrong: list[str] = field(default_factory=list)
    """What else is not as promised."""

    @property
    def faults(self) -> list[str]:
        return [*self.hangs, *self.lost, *self.differs, *self.wrong]

    def note(self, end: Ended) -> None:
        """Take down how a job has ended, and see that it neither hung nor fell over."""
        self.ended = " then ".join(filter(None, (self.ended, end.told)))
        self.said = self.said or " ".join(end.said)
        if end.has_hung:
            self.hangs.append("it did not end")
        if any("Traceback" in text for text in end.complaints):
            self.wrong.append(f"a traceback: {end.said[-1]}")

    def expect_status(self, end: Ended, status: int) -> None:
        """See that a job has ended with ``status``; with 2, in one sentence."""
        if end.status != status and not (status and len(end.ranks) and end.status):
            self.wrong.append(f"status {end.status}, not {status}")
        if any(found not in (status, None) for found in end.ranks):
            self.wrong.append(f"ranks ended with {end.ranks}, not {status}")
        if status == 2 and len([line for line in end.said if line.startswith("error")]) != 1:
            self.wrong.append(f"not one sentence: {end.said}")


@dataclass(frozen=True)
class Whole:
    """An undisturbed run, with several checkpoints kept."""

    out: Path
    lines: list[Line]
    weights: dict[str, str]
    """Digests of model and optimizer, at the last step."""

    @classmethod
    def of(cls, out: Path) -> Whole:
        """The run that has ended in the folder ``out``."""
        newest = checkpoint.latest(out / "checkpoints")
        assert newest is not None
        return cls(out, lines_in(out), digests(newest))


def lines_in(out: Path) -> list[Line]:
    """The whole lines of metrics, in their order; a torn one at the end is none."""
    path = out / "metrics.jsonl"
    texts = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    return [_line(text) for text in texts[:-1]]


def num_lines(out: Path) -> int:
    """How many lines of metrics there are, to be asked often."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def newest_step(out: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max(checkpoint.steps(out / "checkpoints"), default=0)


def written_since(out: Path, started: float) -> list[str]:
    """Names of the checkpoints that are being written, made after the time ``started``."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(out / "checkpoints"):
            if entry.name.startswith("tmp-step-"):
                with contextlib.suppress(OSError):
                    found += [entry.name] * (entry.stat().st_mtime > started)
    return found


def digests(path: Path) -> dict[str, str]:
    """A digest of every tensor in a checkpoint, by its name."""
    with tempfile.TemporaryDirectory(prefix="qsdp-crash-") as folder:
        whole = Path(folder, "whole.pt")
        dcp_to_torch_save(path, whole)
        state = torch.load(whole, weights_only=True)
    found: dict[str, str] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[name] = hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()

    collect("", state)
    return found


def tree(folder: Path) -> dict[str, str | None]:
    """Every file's digest and every folder's name."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def left_by_a_kill(whole: Whole, out: Path, step: int) -> None:
    """Make ``out`` what a run killed after ``step`` leaves, of which ``whole`` has a checkpoint."""
    checkpoints = checkpoint.steps(whole.out / "checkpoints")
    kept = [path for number, path in checkpoints.items() if number <= step][-2:]
    for path in kept:
        shutil.copytree(path, out / "checkpoints" / path.name)
    shutil.copy(whole.out / "config.toml", out)
    texts = (whole.out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(texts[: step + 1]))


def damage(path: Path, how: str, rng: random.Random) -> str:
    """Damage a file in one of ``HOWS``; returns where."""
    if how == "missing":
        path.unlink()
        return ""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if how == "truncated":
        path.write_bytes(data[:at])
        return f"to {at:,} of {len(data):,} bytes"
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"byte {at:,} of {len(data):,}"


def judge_stopped(row: Row, out: Path, whole: Whole, before: int) -> None:
    """Judge a run that was stopped anywhere: its lines are whole, and no checkpoint has gone.

    ``before`` is the step of the newest checkpoint when it was started.
    """
    lines, newest = lines_in(out), newest_step(out)
    if lines != whole.lines[: len(lines)]:
        row.lost.append(_difference(lines, whole.lines[: len(lines)]))
    if newest < before:
        row.lost.append(f"the checkpoint of step {before} is gone")
    if len(lines) < newest:
        row.lost.append(f"step {newest} has a checkpoint, but only {len(lines)} lines are there")


def judge_start(row: Row, end: Ended, newest: int) -> None:
    """See that a run went on from its newest checkpoint, or has said why not."""
    found = _GOING_ON.search(end.printed)
    step = int(found[1]) if found else 0
    has_begun = found is not None or "results in" in end.printed
    if has_begun and step < newest and not is_told_of(end, newest):
        row.lost.append(f"it went on from step {step}, not {newest}, and did not say why")


def is_told_of(end: Ended, step: int) -> bool:
    """Whether a line names the checkpoint of ``step``, not as the one to go on from."""
    texts = [end.printed, *end.complaints]
    lines = [line for text in texts for line in text.splitlines()]
    return any(f"step-{step:08d}" in line and not _GOING_ON.search(line) for line in lines)


def judge_end(row: Row, end: Ended, out: Path, whole: Whole) -> None:
    """See that a run that ended well has come to what the undisturbed one has.

    Nothing is left lying about. A run that was refused has lost nothing yet.
    """
    if end.status:
        return
    lines = lines_in(out)
    if lines != whole.lines:
        row.lost.append(_difference(lines, whole.lines))
    found: dict[str, str] = {}
    try:
        newest = checkpoint.resolve(out)
        checkpoint.verify(newest)
        found = digests(newest)
    except ValueError as error:
        row.wrong.append(quoted(error))
    different = [
        name for name in whole.weights.keys() | found if whole.weights.get(name) != found.get(name)
    ]
    if different:
        row.differs.append(f"{len(different)} of {len(whole.weights)} tensors differ")
    summary = out / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["steps"] != len(whole.lines):
        row.wrong.append("there is no summary of all steps")
    debris = [
        name
        for name in tree(out)
        if name == "run.lock" or re.search(r"(^|/)tmp-|\.(tmp|partial|new)(/|$)", name)
    ]
    if debris:
        row.wrong.append(f"left behind: {', '.join(debris[:3])}")


@functools.cache
def can_mount() -> bool:
    """Whether this user may mount a file system here."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="qsdp-crash-") as folder,
            small_disk(Path(folder), 1),
        ):
            return True
    except Unavailable:
        return False


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[None]:
    """Inside, the folder ``path`` is a disk of its own (tmpfs).

    Raises Unavailable without mount.
    """
    path.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={kib}k", "qsdp-crash", str(path))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def resize(path: Path, kib: int) -> None:
    """Give a ``small_disk`` another size."""
    _mount("-o", f"remount,size={kib}k", str(path))


def fill(path: Path) -> Path:
    """Leave no room on the disk of the folder ``path``. Returns the file that takes it."""
    ballast = path / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Inside, nothing can be written in the folder ``path``.

    Raises Unavailable for root without mount: modes do not bind it.
    """
    if os.geteuid():
        folders = [path, *(inner for inner in path.rglob("*") if inner.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        try:
            yield
        finally:
            for folder in folders:
                folder.chmod(0o755)
        return
    _mount("--bind", str(path), str(path))
    try:
        _mount("-o", "remount,ro,bind", str(path))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable("there is no program mount: install util-linux.") from None
    if done.returncode:
        raise Unavailable(f"mount failed with status {done.returncode} ({quoted(done.stderr)}).")


def _line(text: str) -> Line:
    try:
        found = json.loads(text)
        # Where changes are sent, a run that goes on sends all codes first.
        more = [] if "changed_codes" in found else ["wire_bytes_sent"]
        return tuple(found[name] for name in (*SAME, *more))
    except (ValueError, KeyError, TypeError):
        return ("torn", text[:40])


def _difference(lines: list[Line], expected: list[Line]) -> str:
    steps, wanted = [line[0] for line in lines], [line[0] for line in expected]
    if steps != wanted:
        missing = [step for step in wanted if step not in steps]
        twice = [step for step in wanted if steps.count(step) > 1]
        return f"{len(lines)} lines of {len(expected)}; missing {missing[:5]}, twice {twice[:5]}"
    first = next(step for step, *_ in (a for a, b in zip(lines, expected, strict=True) if a != b))
    return f"the line of step {first} is not that of the undisturbed run"
