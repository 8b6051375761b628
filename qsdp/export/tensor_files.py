"""Writing safetensors tensor by tensor, into files of bounded size.

The safetensors library writes whole files from memory. Here a file's header, which holds every
tensor's dtype, shape and place, is written first, and the tensors follow as they come.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qsdp.checkpoint import Crc32, crc32_of_bytes
from qsdp.common.dtypes import CODEC_DTYPES

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_ALIGNMENT = 8  # of the header's end, as the library has it

Kind = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""


class TensorFiles:
    """Tensors that are known by dtype and shape before, written in their order, one at a time.

    The names are Hugging Face's: STEM.safetensors if all fit into one file, else
    STEM-00001-of-00003.safetensors and so on, with STEM.safetensors.index.json beside them.
    """

    def __init__(
        self, folder: Path, stem: str, kinds: Mapping[str, Kind], file_bytes: int, form: str = "pt"
    ) -> None:
        """Lay out the files.

        Args:
            folder: Where the files go.
            stem: How their names begin.
            kinds: What ``write`` will be given, by name, in this order.
            file_bytes: The most bytes of tensors in one file, which holds at least one tensor.
            form: The ``format`` that each file's header states.
        """
        self._folder, self._kinds, self._form = folder, dict(kinds), form
        self._crcs: dict[str, Crc32 | str] = {}
        groups = _split(kinds, file_bytes)
        numbers = range(1, len(groups) + 1)
        names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in numbers]
        if len(groups) == 1:
            names = [f"{stem}.safetensors"]
        else:
            pairs = zip(names, groups, strict=True)
            index = {
                "metadata": {"total_size": sum(map(_num_bytes, kinds.values()))},
                "weight_map": {name: file for file, group in pairs for name in group},
            }
            text = json.dumps(index, indent=1) + "\n"
            index_name = f"{stem}.safetensors.index.json"
            (folder / index_name).write_text(text, encoding="utf-8")
            self._crcs[index_name] = crc32_of_bytes(text.encode())
        self._files = list(zip(names, groups, strict=True))
        self._expected: list[str] = []
        self._file: BinaryIO | None = None
        self._crc = Crc32()

    @property
    def checksums(self) -> dict[str, str]:
        """The CRC-32 of each file by its name, as checkpoints state it, once all is written."""
        return {name: str(crc) for name, crc in self._crcs.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        if not self._expected:
            self._open_next()
        expected = self._expected.pop(0)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *self._kinds[name])
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._append(values.numpy().data)

    def close(self) -> None:
        """Put the last file on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _open_next(self) -> None:
        self.close()
        file_name, group = self._files.pop(0)
        self._expected = list(group)
        self._file = (self._folder / file_name).open("wb")
        self._crcs[file_name] = self._crc = Crc32()
        self._append(self._header(group))

    def _append(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        self._crc.add(data)

    def _header(self, group: Sequence[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": self._form}}
        begin = 0
        for name in group:
            dtype, shape = self._kinds[name]
            end = begin + _num_bytes(self._kinds[name])
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def check_dtypes(
    source: Path, stored: Mapping[str, torch.dtype], chosen: torch.dtype | None = None
) -> None:
    """Raise ValueError unless parameters ``stored`` in ``source`` can be written as ``chosen``.

    None writes them as they are stored. fp64 must be cast; what is no floating-point number, or has
    a scale elsewhere, is no weight.
    """
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in CODEC_DTYPES)
    if chosen not in (None, *CODEC_DTYPES):
        raise ValueError(f"dtype is {chosen}: choose one of {allowed}.")
    for name, dtype in stored.items():
        if dtype in CODEC_DTYPES or (dtype == torch.float64 and chosen is not None):
            continue
        remedy = "choose one of these" if dtype == torch.float64 else "name a model of such weights"
        raise ValueError(
            f"{source} holds {name} as {str(dtype).removeprefix('torch.')}, but weights are "
            f"written as {allowed}: {remedy}."
        )


def _split(kinds: Mapping[str, Kind], file_bytes: int) -> list[list[str]]:
    """The names, in order, of each file's tensors."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, kind in kinds.items():
        size = _num_bytes(kind)
        if groups[-1] and filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _num_bytes(kind: Kind) -> int:
    dtype, shape = kind
    return dtype.itemsize * math.prod(shape)
