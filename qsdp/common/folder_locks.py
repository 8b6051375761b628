"""Folders, and files that become others, under a lock that ends with the process (flock)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Inside, the folder is locked: another process that locks it waits."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        has_locked(folder)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def unlocked_folder(path: Path) -> Iterator[bool]:
    """Whether the folder ``path`` is there and no process has locked it; inside, none can."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield has_locked(folder, is_waiting=False) and is_named_so(folder, path)
    finally:
        os.close(folder)


def has_locked(descriptor: int, *, is_waiting: bool = True) -> bool:
    """Whether an open file or folder could be locked, or lies where there are no locks."""
    how = fcntl.LOCK_EX if is_waiting else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def is_named_so(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file: who held the lock before may have renamed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
