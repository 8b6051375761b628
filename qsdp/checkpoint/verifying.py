"""Whether the files of a checkpoint are as they were saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from qsdp.checkpoint.all_ranks import meet_all_ranks
from qsdp.checkpoint.crc32 import crc32_of_file
from qsdp.checkpoint.damaged import Damaged
from qsdp.checkpoint.folders import META
from qsdp.checkpoint.meta_json import read_meta
from qsdp.checkpoint.safe_dcp import SafeReader

T = TypeVar("T")


def verify(
    path: Path,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Verify this rank's part of a checkpoint's files: whether they are as ``save`` left them.

    ``progress`` is called with the number of bytes that were just read.

    Raises:
        Damaged: A file is not as it was left.
        ValueError: A file cannot be read.
    """
    verify_files(path, read_meta(path)["checksums"], META, rank, size, progress)


def verify_files(
    path: Path,
    stated: Mapping[str, str],
    record: str,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Verify this rank's part of the files in a folder, by their ``stated`` checksums.

    Those stand in the file ``record``. The rest is as in ``verify``.
    """
    for name in sorted(stated)[rank::size]:
        try:
            if crc32_of_file(path / name) != stated[name]:
                raise Damaged(path, name, f"its checksum is not the one in {record}")
            progress((path / name).stat().st_size)
        except FileNotFoundError:
            raise Damaged(path, name, "it is missing") from None
        except OSError as error:
            raise ValueError(
                f"{path / name} cannot be read ({error.strerror}): name another checkpoint."
            ) from None


def check(path: Path) -> None:
    """Verify the whole checkpoint at ``path``, all ranks together: each file is read by one rank.

    Raises:
        Damaged: On every rank, if a file is missing, truncated or altered.
        ValueError: A file cannot be read, or asks for code.
        RuntimeError: Ranks name different checkpoints.
    """
    meet_all_ranks("check", folder=path)
    verified_reader(path)


def verified_reader(path: Path, *, is_checked: bool = False) -> SafeReader:
    """A reader of a checkpoint, after verifying it with all ranks. Raises as ``check``.

    It is not verified again where it ``is_checked``.
    """

    def read(rank: int, size: int) -> SafeReader:
        if not is_checked:
            verify(path, rank, size)
        return SafeReader(path)

    return on_all_ranks(read)


def on_all_ranks(work: Callable[[int, int], T]) -> T:
    """Call ``work`` with this rank and their number, on every rank, and return its result.

    It must not communicate. What one rank finds damaged or cannot read raises on every rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    mistake = None
    try:
        result = work(rank, size)
    except ValueError as error:
        mistake = error if isinstance(error, Damaged) else str(error)
    mistakes: list[Damaged | str | None] = [None] * size
    dist.all_gather_object(mistakes, mistake)
    # What cannot be read may be whole: it is not passed over because another file is damaged.
    for first in sorted(filter(None, mistakes), key=lambda each: isinstance(each, Damaged)):
        raise first if isinstance(first, Damaged) else ValueError(first)
    return result
