"""DCP's files read and written so that nothing in them can run.

DCP keeps two kinds of pickles: the table of contents (`.metadata`), and a small one in the data
files for every value that is no tensor. Its own reader lets both name any function. Here the table
is read into records without code, of which DCP's objects are made after a look at every value, and
all else by torch's restricted unpickler. What that one could not read back is not written.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.futures import Future

from qsdp.checkpoint.folders import META, read_meta

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
_UNUSED = (  # how memory was laid out (in Python 3.11.0 an enum by `getattr`), where the folder lay
    ("builtins", "getattr"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
)


_Box = tuple[Sequence[int], Sequence[int]]


class Refused(ValueError):
    """A checkpoint holds what it may not, or would; the message is the whole sentence."""


class Reader(FileSystemReader):
    """Reads a checkpoint's files; its table is read, and looked at, once, when this is made."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the table cannot be read, asks for code, or leads out of `path`."""
        super().__init__(path)
        files = read_meta(path)["checksums"]
        if TABLE not in files:
            raise Refused(f"{path / META} does not list {TABLE}; name another checkpoint")
        self.metadata = _read_table(path / TABLE, files)

    # Without keywords, so that DCP does not look for tables of single ranks.
    def read_metadata(self) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            with _plain_only():
                return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            name = asked[1] if asked else "more than plain data"
            raise _refused(Path(self.path), name) from None


class ReadingPlanner(DefaultLoadPlanner):
    """Takes tensors and plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        with _plain_only():
            loaded = torch.load(value, weights_only=True)
        held, numbers = self.state_dict[name], (int, float, Tensor)
        if isinstance(held, Tensor) and held.dim():
            is_alike = isinstance(loaded, Tensor)
        else:  # a switch may have been unset
            is_alike = (
                loaded is None or isinstance(loaded, numbers) or not isinstance(held, numbers)
            )
        if not is_alike:
            raise TypeError(f"{name} is of another kind")
        # The default planner unpickles without a limit, so it gets what was written here.
        again = io.BytesIO()
        torch.save(loaded, again)
        again.seek(0)
        super().load_bytes(read_item, again)


class WritingPlanner(DefaultSavePlanner):
    """Refuses what `ReadingPlanner` could not read. NumPy's numbers become Python's."""

    def create_local_plan(self) -> SavePlan:
        for name, value in self.state_dict.items():
            with torch.no_grad():
                value = value.to_local() if isinstance(value, DTensor) else value
            # Of another class, an 8-bit optimizer's for one: code would have to make it.
            if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
                raise _unreadable(name, type(value))
        plan = super().create_local_plan()
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                name = item.index.fqn
                self.state_dict[name] = readable(name, self.state_dict[name])
        return plan


@contextmanager
def _plain_only() -> Iterator[None]:
    """Inside, torch's restricted unpickler makes no object of the classes that were added to its
    list: torch itself adds some, and one of them, DeviceMesh, opens process groups."""
    given = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(given)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def readable(name: str, value: object) -> Any:
    """What `ReadingPlanner` gives for `value` later. Raises Refused if it could not read that."""
    value = _plain(value)
    written = io.BytesIO()
    try:
        torch.save(value, written)
        written.seek(0)
        with _plain_only():
            torch.load(written, weights_only=True)
    except Exception:  # pickling calls the value's own methods
        raise _unreadable(name, type(value)) from None
    return value


def _unreadable(name: str, kind: type) -> Refused:
    return Refused(
        f"{name} is or holds an object ({_name_of(kind)}) that could only be loaded by running "
        "code, which a checkpoint never does: keep plain tensors, numbers, strings, and lists, "
        "tuples and dicts of these"
    )


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Record:
    """What a pickle says of an object, in place of that object."""

    kind = ""
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TableUnpickler(pickle.Unpickler):
    """Knows nothing but sizes, dtypes, and classes that are its own: a pickle may call what it
    names, and set attributes of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file)
        self._path = path
        self._known: dict[tuple[str, str], Any] = {("torch", "Size"): torch.Size}
        for place in _RECORDS:
            self._known[place] = type("Record", (_Record,), {"kind": place[1]})
        for place in _UNUSED:
            self._known[place] = type("Unused", (_Record,), {"__init__": lambda self, *_: None})

    def find_class(self, module: str, name: str) -> Any:
        """By its whole name only: pickle itself would follow the dots in one."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise _refused(self._path, f"{module}.{name}")


class _Place(NamedTuple):
    """As DCP's `_StorageInfo`: where in which file an entry lies."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def _read_table(path: Path, files: Collection[str]) -> Metadata:
    try:
        with path.open("rb") as file:
            return _metadata(path, _TableUnpickler(path, file).load(), files)
    except Refused:
        raise
    except Exception as error:  # it is a pickle: anything may come of a damaged one
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); name another checkpoint"
        ) from None


def _refused(path: Path, name: str) -> Refused:
    return Refused(
        f"{path} asks for {name[:100]!r} to be loaded, which no checkpoint needs and which could "
        "run code: it is refused; name another checkpoint"
    )


def _metadata(path: Path, table: Any, files: Collection[str]) -> Metadata:
    """DCP's objects of a table's records. Raises anything if it is not as DCP writes it."""
    contents = _fields(table, "Metadata")
    entries = {_text(n): _entry(e) for n, e in _dict(contents["state_dict_metadata"]).items()}
    places = {}
    for index, record in _dict(contents["storage_data"]).items():
        place = _place(record)
        if place.relative_path not in files:
            raise Refused(
                f"{path} names {place.relative_path[:100]!r}, which is none of the files that "
                f"{META} lists: it is refused; name another checkpoint"
            )
        places[_index(index)] = place
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if record.kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    properties = fields["properties"]
    _check(properties.kind == "TensorProperties")
    dtype, size = properties.state[0], _size(fields["size"])
    _check(isinstance(dtype, torch.dtype))
    _check(type(fields["chunks"]) is list)
    parts = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    chunks = [ChunkStorageMetadata(_size(p["offsets"]), _size(p["sizes"])) for p in parts]
    # What no chunk holds would be read as whatever was in memory.
    boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks if math.prod(chunk.sizes)]
    _check(not math.prod(size) or _fill(boxes, range(len(size)), size))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _fill(boxes: Sequence[_Box], dims: Iterable[int], size: torch.Size) -> bool:
    """Whether the boxes, alike in all but ``dims``, fill a tensor of ``size`` without overlap: cut
    along one dimension, and what lies between two cuts along the others."""
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


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset, number = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]),
        None if offset is None else _size(offset),
        None if number is None else _count(number),
    )


def _place(record: Any) -> _Place:
    fields = _fields(record, "_StorageInfo")
    _check(fields.get("transform_descriptors") is None)
    path, offset, length = (fields[name] for name in ("relative_path", "offset", "length"))
    return _Place(_text(path), _count(offset), _count(length))


def _check(holds: bool) -> None:
    if not holds:
        raise TypeError("the table is not as DCP writes one")


def _fields(record: Any, kind: str) -> dict[str, Any]:
    _check(isinstance(record, _Record))
    _check(record.kind == kind)
    return _dict(record.state)


def _dict(value: Any) -> dict[Any, Any]:
    _check(type(value) is dict)
    return value


def _text(value: Any) -> str:
    _check(type(value) is str)
    return value


def _count(value: Any) -> int:
    _check(type(value) is int)
    _check(value >= 0)
    return value


def _size(value: Any) -> torch.Size:
    _check(type(value) is torch.Size)
    _check(min(value, default=0) >= 0)
    return value
