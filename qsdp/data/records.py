"""Files of records, each a document: JSONL, plain or gzipped, and parquet. No torch here.

They are read as a stream: of JSONL one line lies in memory, of parquet a few rows of one column.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from qsdp.common.user_errors import quoted

TEXT_FIELD = "text"
MAX_LINE_BYTES = 1 << 28
"""A longer line is most likely no record, but a whole file without line ends."""
_PARQUET_ROWS = 64  # read together
_BUFFER_BYTES = 1 << 20
_JSONL = (".jsonl", ".jsonl.gz")
_NOT_READ = (".json", ".ndjson", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".zip")
_SHOWN_FIELDS = 400  # characters of their names
_KINDS = {bool: "true or false", list: "a list", dict: "an object", type(None): "null"}


def is_records(path: str | Path) -> bool:
    """Whether a file of this name holds records; another one is plain text."""
    return str(path).lower().endswith((*_JSONL, ".parquet"))


def check_kind(path: Path) -> None:
    """Raise ValueError for a file that by its name is neither text nor of records that are read."""
    if not is_records(path) and path.name.lower().endswith(_NOT_READ):
        raise ValueError(
            f"{path} is of a kind that is not read ({path.suffix}): give plain text, JSONL "
            "(.jsonl, .jsonl.gz) or parquet (.parquet), or name it .txt if it is plain text."
        )


def record_bytes(path: Path, field: str = TEXT_FIELD) -> int:
    """The bytes that ``read_documents`` counts in a file.

    They are those of JSONL, unpacked, or of parquet's column, unpacked. Raises ValueError for an
    empty or damaged file, or a column that is missing or of no texts.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: leave it out, or give another file.")
    if _is_parquet(path):
        with _open_column(path, field) as file:
            return sum(_group_bytes(file, field, group) for group in range(file.num_row_groups))
    if not _is_gzip(path):
        return path.stat().st_size
    with _open_lines(path) as lines:
        return sum(map(len, iter(lambda: lines.read(_BUFFER_BYTES), b"")))


def read_documents(path: Path, field: str = TEXT_FIELD) -> Iterator[tuple[str, int]]:
    """The texts of a file's records in order, each with the bytes up to its record's end.

    Raises:
        ValueError: Where it is read, a record is damaged, lacks the field, or has no text in it, or
            there is no record at all.
    """
    position = -1
    for place, text, position in (_rows if _is_parquet(path) else _lines)(path, field):
        if not isinstance(text, str):
            raise ValueError(
                f"the field {field!r} in {place} of {path} is {_kind(text)}, no text: correct it, "
                "or name another field by --text-field."
            )
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text in {place} of {path} holds {text[error.start]!r}, which UTF-8 "
                    "cannot express: leave it out."
                ) from None
        yield text, position
    if position < 0:
        raise ValueError(f"{path} holds no record: leave it out, or give another file.")


def _lines(path: Path, field: str) -> Iterator[tuple[str, Any, int]]:
    """(where it is, the field's value, bytes up to its end) of each line of JSONL."""
    position = number = 0
    with _open_lines(path) as lines:
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            position += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"line {number} of {path} is longer than {MAX_LINE_BYTES} bytes: write one "
                    "JSON object a line."
                )
            if line.strip():
                yield f"line {number}", _value(line, f"line {number} of {path}", field), position


def _value(line: bytes, place: str, field: str) -> Any:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 text (byte {error.start} of the line): convert the file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is not JSON ({quoted(error, 200)}): write one JSON object a line."
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} is {_kind(record)}: write one JSON object a line.")
    if field not in record:
        raise ValueError(_field_is_missing(place, field, record))
    return record[field]


@contextmanager
def _open_lines(path: Path) -> Iterator[BinaryIO]:
    with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as lines:
        try:
            yield cast(BinaryIO, lines)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(_is_damaged(path, "gzip", error)) from None


def _rows(path: Path, field: str) -> Iterator[tuple[str, Any, int]]:
    """(where it is, the field's value, bytes up to its end) of each row of parquet."""
    number = position = 0
    with _open_column(path, field) as file:
        for group in range(file.num_row_groups):
            size, rows = _group_bytes(file, field, group), file.metadata.row_group(group).num_rows
            batches = file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field])
            values = (value for batch in batches for value in batch.column(0))
            for row in range(1, rows + 1):
                number += 1
                try:
                    text = next(values).as_py()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"row {number} of {path} is not UTF-8 text (byte {error.start} of its "
                        f"field {field!r}): write it again."
                    ) from None
                yield f"row {number}", text, position + size * row // rows
            position += size


@contextmanager
def _open_column(path: Path, field: str) -> Iterator[Any]:
    """A file of parquet whose column ``field`` holds texts."""
    arrow, parquet = _pyarrow(path)
    try:
        # With a buffer of its own, a column is read in parts.
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            _check_column(path, file.schema_arrow, field, arrow)
            yield file
    except (arrow.ArrowException, OSError, StopIteration) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it cannot be opened, and says so
        raise ValueError(_is_damaged(path, "parquet", error)) from None


def _pyarrow(path: Path) -> tuple[ModuleType, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path} is parquet, for which pyarrow is not installed: run 'pip install qsdp[data]', "
            "or give JSONL or plain text."
        ) from None
    return pyarrow, pyarrow.parquet


def _check_column(path: Path, schema: Any, field: str, arrow: Any) -> None:
    if field not in schema.names:
        raise ValueError(_field_is_missing(str(path), field, schema.names))
    kind, types = schema.types[schema.names.index(field)], arrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(
            f"the field {field!r} of {path} is of the type {quoted(str(kind), 100)}, no text: name "
            "another field by --text-field."
        )


def _group_bytes(file: Any, field: str, group: int) -> int:
    """The bytes of the column in a group of rows, at least one a row."""
    meta = file.metadata.row_group(group)
    columns = (meta.column(i) for i in range(meta.num_columns))
    found = (c.total_uncompressed_size for c in columns if c.path_in_schema == field)
    return max(sum(found), meta.num_rows)


def _field_is_missing(place: str, field: str, fields: Iterable[str]) -> str:
    names = quoted(", ".join(map(repr, fields)), _SHOWN_FIELDS) or "none"
    return f"{place} has no field {field!r}, only {names}: name one of them by --text-field."


def _is_damaged(path: Path, kind: str, error: Exception) -> str:
    return f"{path} is no {kind}, or is damaged ({quoted(error, 200)}): copy or write it again."


def _kind(value: Any) -> str:
    """What a value of JSON is."""
    return _KINDS.get(type(value), "text" if isinstance(value, str) else "a number")


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")
