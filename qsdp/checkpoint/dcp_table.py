"""DCP's table of contents (``.metadata``), a pickle, read so that nothing in it can run.

It is read into records without code, of which DCP's objects are made after a look at every value.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from qsdp.checkpoint.folders import META
from qsdp.checkpoint.plain_values import Refused, not_plain

TABLE = ".metadata"
_DCP = "torch.distributed.checkpoint"
_RECORDS = (
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
)
_UNUSED = (  # how memory was laid out (in Python 3.11.0 an enum by getattr), where the folder lay
    ("builtins", "getattr"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
)

_Box = tuple[Sequence[int], Sequence[int]]


class _Record:
    """What a pickle says of an object, in place of that object."""

    kind = ""
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TableUnpickler(pickle.Unpickler):
    """Knows nothing but sizes, dtypes, and classes that are its own.

    A pickle may call what it names, and set attributes of it.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file)
        self._path = path
        self._known: dict[tuple[str, str], Any] = {("torch", "Size"): torch.Size}
        for place in _RECORDS:
            self._known[place] = type("Record", (_Record,), {"kind": place[1]})
        for place in _UNUSED:
            self._known[place] = type("Unused", (_Record,), {"__init__": lambda self, *_: None})

    def find_class(self, module: str, name: str) -> Any:
        """The class of this whole name only: pickle itself would follow the dots in one."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise not_plain(self._path, f"{module}.{name}")


class _Place(NamedTuple):
    """As DCP's ``_StorageInfo``: where in which file an entry lies."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def read_table(path: Path, files: Collection[str]) -> Metadata:
    """DCP's table of contents in the file ``path``, which may name ``files`` only.

    Raises:
        Refused: The table names other files, or code.
        ValueError: The table cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _metadata(path, _TableUnpickler(path, file).load(), files)
    except Refused:
        raise
    except Exception as error:  # it is a pickle: anything may come of a damaged one
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): name another checkpoint."
        ) from None


def _metadata(path: Path, table: Any, files: Collection[str]) -> Metadata:
    """DCP's objects of a table's records. Raises some error if the table is not DCP's."""
    contents = _fields_of(table, "Metadata")
    entries = {
        _checked_text(n): _read_entry(e)
        for n, e in _checked_dict(contents["state_dict_metadata"]).items()
    }
    places = {}
    for index, record in _checked_dict(contents["storage_data"]).items():
        place = _read_place(record)
        if place.relative_path not in files:
            raise Refused(
                f"{path} names {place.relative_path[:100]!r}, which is none of the files that "
                f"{META} lists, and is refused: name another checkpoint."
            )
        places[_read_index(index)] = place
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _read_entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if record.kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields_of(record, "TensorStorageMetadata")
    properties = fields["properties"]
    _check_table(properties.kind == "TensorProperties")
    dtype, size = properties.state[0], _checked_size(fields["size"])
    _check_table(isinstance(dtype, torch.dtype))
    _check_table(type(fields["chunks"]) is list)
    parts = [_fields_of(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    chunks = [
        ChunkStorageMetadata(_checked_size(p["offsets"]), _checked_size(p["sizes"])) for p in parts
    ]
    # What no chunk holds would be read as whatever was in memory.
    boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks if math.prod(chunk.sizes)]
    _check_table(not math.prod(size) or _fill(boxes, range(len(size)), size))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _fill(boxes: Sequence[_Box], dims: Iterable[int], size: torch.Size) -> bool:
    """Whether the boxes, alike in all but ``dims``, fill a tensor of ``size`` without overlap.

    They are cut along one dimension, and what lies between two cuts along the others.
    """
    dims = list(dims)
    if not boxes or not dims:
        return len(boxes) == 1
    for dim in dims:
        between: dict[tuple[int, int], list[_Box]] = {}
        for offsets, sizes in boxes:
            between.setdefault((offsets[dim], offsets[dim] + sizes[dim]), []).append(
                (offsets, sizes)
            )
        cuts = sorted(between)
        ends = [0, *(end for _, end in cuts)]
        rest = [other for other in dims if other != dim]
        is_cut = [begin for begin, _ in cuts] == ends[:-1] and ends[-1] == size[dim]
        if is_cut and all(_fill(inner, rest, size) for inner in between.values()):
            return True
    return False


def _read_index(record: Any) -> MetadataIndex:
    fields = _fields_of(record, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _checked_text(fields["fqn"]),
        None if offset is None else _checked_size(offset),
        None if number is None else _checked_count(number),
    )


def _read_place(record: Any) -> _Place:
    fields = _fields_of(record, "_StorageInfo")
    _check_table(fields.get("transform_descriptors") is None)
    path, offset, length = (fields[name] for name in ("relative_path", "offset", "length"))
    return _Place(_checked_text(path), _checked_count(offset), _checked_count(length))


def _check_table(holds: bool) -> None:
    if not holds:
        raise TypeError("the table is not as DCP writes one.")


def _fields_of(record: Any, kind: str) -> dict[str, Any]:
    _check_table(isinstance(record, _Record))
    _check_table(record.kind == kind)
    return _checked_dict(record.state)


def _checked_dict(value: Any) -> dict[Any, Any]:
    _check_table(type(value) is dict)
    return value


def _checked_text(value: Any) -> str:
    _check_table(type(value) is str)
    return value


def _checked_count(value: Any) -> int:
    _check_table(type(value) is int)
    _check_table(value >= 0)
    return value


def _checked_size(value: Any) -> torch.Size:
    _check_table(type(value) is torch.Size)
    _check_table(min(value, default=0) >= 0)
    return value
