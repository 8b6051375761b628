"""A folder on a disk that may stop, or be full, at any operation.

A killed process leaves what the folder holds at that instant; a power cut leaves of each file what
was put on disk before, and perhaps some of the rest. So one undisturbed call shows what every kill
would leave. Seen are the functions of ``os`` that change something, and files that Python opens to
write.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, bytes | None]
"""What is in a folder, by path: the content of files, None for folders."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NEEDS_ROOM = ("open", "write", "mkdir", "rename", "fsync")
# What debris is called: of files, of folders, of checkpoints.
DEBRIS = (
    *("*.tmp", "*.partial", "tmp-*", "*.new"),
    *("metrics.*.jsonl", "config.*.toml", "dense-twin.*"),
)


def tree(folder: Path) -> Tree:
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def put_back(folder: Path, content: Tree) -> None:
    """Make ``folder`` hold ``content`` and nothing else.

    Whose lock it was is dead: it binds nobody.
    """
    content = {name: data for name, data in content.items() if name != "run.lock"}
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        name = str(path.relative_to(folder))
        if name not in content or path.is_dir() != (content[name] is None):
            path.rmdir() if path.is_dir() else path.unlink()
    for name, data in content.items():
        path = folder / name
        if data is None:
            path.mkdir(exist_ok=True)
        elif not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def debris(folder: Path) -> list[str]:
    return sorted({str(p.relative_to(folder)) for name in DEBRIS for p in folder.rglob(name)})


@dataclass
class State:
    """What a folder holds when its disk stops."""

    when: str
    content: Tree = field(repr=False)


def states(folder: Path, work: Callable[[], object]) -> list[State]:
    """All that ``folder`` may hold when ``work`` is killed, or the power is cut, at any operation.

    The last one is what ``work`` leaves. Each comes once, however many operations it lasts.
    """
    found: dict[int, State] = {}
    count = 0

    def keep(operation: str, name: str) -> None:
        nonlocal count
        count += 1
        for how, content in (("killed", disk.tree()), ("power cut", disk.durable_tree())):
            found.setdefault(
                hash(frozenset(content.items())), State("", content)
            ).when = f"{how} before operation {count}: {operation} {name}"

    with _Disk(folder, keep) as disk:
        work()
        undone = [name for name in disk.moved if (folder / name).exists()]
        assert not undone, f"a power cut may still undo what has ended: {undone}"
    assert count, "nothing was seen"
    content = tree(folder)
    found.pop(hash(frozenset(content.items())), None)
    return [*found.values(), State("at the end", content)]


def count_operations(folder: Path, work: Callable[[], object]) -> int:
    """How many operations of ``work`` need room on the disk."""
    count = 0

    def see(operation: str, name: str) -> None:
        nonlocal count
        count += operation in _NEEDS_ROOM

    with _Disk(folder, see):
        work()
    return count


@contextlib.contextmanager
def full_disk(folder: Path, after: int, needs: Sequence[str] = _NEEDS_ROOM) -> Iterator[None]:
    """Inside, operations that need room have none, from number ``after`` of them on."""
    count = 0

    def refuse(operation: str, name: str) -> None:
        nonlocal count
        if operation in needs:
            count += 1
            if count >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))

    with _Disk(folder, refuse):
        yield


@contextlib.contextmanager
def refusing(folder: Path, is_refused: Callable[[str], bool]) -> Iterator[None]:
    """Inside, nothing can be changed or put on disk whose path in ``folder`` is refused."""

    def refuse(operation: str, name: str) -> None:
        if is_refused(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / name))

    with _Disk(folder, refuse):
        yield


@contextlib.contextmanager
def killed(folder: Path, after: int) -> Iterator[None]:
    """Inside, this process ends at operation number ``after``, without a word."""
    count = 0

    def end(operation: str, name: str) -> None:
        nonlocal count
        count += 1
        if count >= after:
            os._exit(0)

    with _Disk(folder, end):
        yield


class _Disk:
    """Calls ``before`` with each operation in ``folder``, and the path in it, before it is done."""

    def __init__(self, folder: Path, before: Callable[[str, str], None]) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._tell = before
        self._patch = pytest.MonkeyPatch()
        self._durable: dict[int, int] = {}
        self._read: dict[tuple[int, int, int, int], bytes] = {}
        self.moved: list[str] = []
        """Renames that are not on disk yet."""

    def __enter__(self) -> _Disk:
        for path in self._folder.rglob("*"):
            status = path.stat()
            self._durable[status.st_ino] = status.st_size
        for name in ("mkdir", "rename", "replace", "remove", "unlink", "rmdir", "link", "symlink"):
            self._patch.setattr(os, name, self._by_path(name, getattr(os, name)))
        self._patch.setattr(os, "open", self._os_open(os.open))
        self._patch.setattr(os, "truncate", self._truncate(os.truncate))
        self._patch.setattr(os, "ftruncate", self._truncate(os.ftruncate))
        self._patch.setattr(os, "fsync", self._fsync(os.fsync))
        opened = self._open(io.open)
        self._patch.setattr(io, "open", opened)
        self._patch.setattr(builtins, "open", opened)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def tree(self) -> Tree:
        """As ``tree``; what nobody has written to since the last time is not read again."""
        content: Tree = {}
        for path in sorted(self._folder.rglob("*")):
            status = path.stat()
            data = None
            if not stat.S_ISDIR(status.st_mode):
                key = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
                if key not in self._read:
                    self._read[key] = path.read_bytes()
                data = self._read[key]
            content[str(path.relative_to(self._folder))] = data
        return content

    def durable_tree(self) -> Tree:
        """What is in the folder after a power cut: of what was not put on disk, half."""
        content = self.tree()
        for name, data in content.items():
            if data is not None:
                safe = self._durable.get((self._folder / name).stat().st_ino, 0)
                if safe < len(data):
                    content[name] = data[: safe + (len(data) - safe) // 2]
        return content

    def _name(self, path: Any) -> str | None:
        """Of what lies in the folder, the path there."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        full = Path(os.path.abspath(os.fsdecode(path)))
        if full == self._folder:
            return "."
        inside = full.is_relative_to(self._folder)
        return str(full.relative_to(self._folder)) if inside else None

    def before(self, operation: str, name: str) -> None:
        told, self._tell = self._tell, lambda operation, name: None  # what it does is not the work
        try:
            told(operation, name)
        finally:
            self._tell = told

    def _is_new(self, descriptor: int, *, truncated: bool) -> None:
        status = os.fstat(descriptor)
        if truncated:
            self._durable[status.st_ino] = 0
        self._durable.setdefault(status.st_ino, 0)

    def _by_path(self, function: str, original: Callable[..., Any]) -> Callable[..., Any]:
        operation = {"replace": "rename", "unlink": "remove"}.get(function, function)

        def call(path: Any, *rest: Any, **more: Any) -> Any:
            name = self._name(path)
            if name is not None:
                self.before(operation, name)
            result = original(path, *rest, **more)
            if name is not None and operation == "rename":
                self.moved.append(self._name(rest[0]) or str(rest[0]))
            return result

        return call

    def _os_open(self, original: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            name = self._name(path) if flags & _WRITING else None
            if name is None:
                return original(path, flags, *rest, **more)
            was_there = os.path.exists(path)
            self.before("open", name)
            descriptor = original(path, flags, *rest, **more)
            self._is_new(descriptor, truncated=bool(flags & os.O_TRUNC) or not was_there)
            return descriptor

        return call

    def _truncate(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(file: Any, length: int) -> None:
            name = "" if isinstance(file, int) else self._name(file)
            if name is not None:
                self.before("truncate", name)
            original(file, length)
            if name is not None:
                number = os.stat(file).st_ino
                self._durable[number] = min(self._durable.get(number, 0), length)

        return call

    def _fsync(self, original: Callable[[int], None]) -> Callable[[int], None]:
        def call(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            name = self._name(os.readlink(f"/proc/self/fd/{descriptor}"))
            if name is not None:
                self.before("fsync", name)
            original(descriptor)
            status = os.fstat(descriptor)
            self._durable[status.st_ino] = status.st_size
            if stat.S_ISDIR(status.st_mode) and name is not None:
                self.moved = [path for path in self.moved if str(Path(path).parent) != name]

        return call

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.before("write", disk._name(os.fspath(self.name)) or "")
                return super().write(data)

        def call(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            name = self._name(file) if set(mode) & set("wax+") else None
            if name is None:
                return original(file, mode, buffering, *rest, **more)
            was_there = os.path.exists(file)
            self.before("open", name)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            self._is_new(raw.fileno(), truncated="w" in mode or not was_there)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

        return call


class Child:
    """A process that calls a function which can be pickled; ``ended`` is how it came out."""

    def __init__(self, work: Callable[..., object], *args: object) -> None:
        self._ours, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_report, args=(theirs, work, args))
        self._process.start()
        theirs.close()

    def ended(self) -> dict[str, Any]:
        """Wait for its ``result``, or its ``error`` and ``text``; {} if it was killed."""
        try:
            said = self._ours.recv()
        except EOFError:
            said = {}
        self._process.join()
        self._ours.close()
        return dict(said)


def _report(pipe: Connection, work: Callable[..., object], args: tuple[object, ...]) -> None:
    try:
        pipe.send({"result": work(*args)})
    except BaseException as error:
        pipe.send({"error": type(error).__name__, "text": str(error)})


# Forked from a server with one thread: a fork of this process may wait for threads that it lacks.
PRELOADED = ["tests.common.test_two_writers"]
# What torch imports when a checkpoint is first saved or read.
PRELOADED += ["torch._dynamo", "torch.distributed.checkpoint._fsspec_filesystem"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


def barrier(number: int) -> Barrier:
    """Where processes wait for each other."""
    return _CONTEXT.Barrier(number)
