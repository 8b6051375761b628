"""CRC-32, by which a checkpoint tells that a file of it is damaged."""

from __future__ import annotations

import zlib
from pathlib import Path


def crc32_of_file(path: Path) -> str:
    """The CRC-32 of a checkpoint's file, ``crc32:`` and eight digits.

    It takes seconds for a rank's share of a large model. It is there to notice what a disk or a
    copy has damaged, not what someone has forged.
    """
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return f"crc32:{crc:08x}"


def crc32_of_bytes(data: bytes) -> str:
    """The CRC-32 of bytes in a checkpoint, in the form of ``crc32_of_file``."""
    return f"crc32:{zlib.crc32(data):08x}"
