"""CRC-32, by which a checkpoint tells that a file of it is damaged."""

from __future__ import annotations

import zlib
from pathlib import Path


def crc32_of_file(path: Path) -> str:
    """The CRC-32 of a checkpoint's file, ``crc32:`` and eight digits.

    It takes seconds for a rank's share of a large model. It is there to notice what a disk or a
    copy has damaged, not what someone has forged.
    """
    crc = Crc32()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc.add(piece)
    return str(crc)


def crc32_of_bytes(data: bytes) -> str:
    """The CRC-32 of bytes in a checkpoint, in the form of ``crc32_of_file``."""
    crc = Crc32()
    crc.add(data)
    return str(crc)


class Crc32:
    """The CRC-32 of bytes that come one after the other, as text in the form of the others."""

    def __init__(self) -> None:
        self._value = 0

    def add(self, data: bytes | memoryview) -> None:
        """Go on with the next bytes."""
        self._value = zlib.crc32(data, self._value)

    def __str__(self) -> str:
        return f"crc32:{self._value:08x}"
