"""Texts in pieces, which are encoded many at a time: no file need lie in memory as a whole."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qsdp.data.records import TEXT_FIELD, check_kind, is_records, read_documents, record_bytes
from qsdp.data.tokenizer import TokenArray, Tokenizer, load_tokenizer
from qsdp.data.transformers_tokenizer import end_of_text

PIECE_BYTES = 1 << 20
# What is encoded at once, by all cores.
_BATCH_CHARACTERS = 16 << 20
_BATCH_PIECES = 1 << 14
_RECORD_END = "\n"


class Piece(NamedTuple):
    """A part of a source that is encoded by itself."""

    text: str
    position: int
    """How many bytes of the source end with it."""
    split: str
    """"train" or "val"."""
    ends: bool
    """Whether a document ends with it."""


@dataclass(frozen=True)
class Source:
    """A text, or a file of records, that is read piece by piece."""

    num_bytes: int
    """As its pieces count them."""
    is_records: bool
    pieces: Callable[[int], Iterator[Piece]]
    """Its pieces in order: what ends up to a given byte is to train on, what follows validates."""


def text_source(data: bytes, origin: str) -> Source:
    """A UTF-8 text in memory; ``origin`` names it in errors."""
    return Source(len(data), False, lambda cut: _text_pieces(data, origin, cut))


def file_source(path: Path, text_field: str | None = None) -> Source:
    """A file of text or, by its name, of records, with the texts in the field ``text_field``.

    Raises ValueError if it is missing, empty, damaged, or of a kind that is not read.
    """
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"the text {path} {state}: give files that exist.")
    check_kind(path)
    if is_records(path):
        field = TEXT_FIELD if text_field is None else text_field
        return Source(record_bytes(path, field), True, lambda cut: _record_pieces(path, field, cut))
    size = path.stat().st_size
    if not size:  # which mmap refuses
        raise ValueError(f"{path} is empty: leave it out, or give another file.")
    return Source(size, False, lambda cut: _file_pieces(path, cut))


def tokenizer_of(
    spec: str | Path, sources: Sequence[Source], document_end: str | None = None
) -> Tokenizer:
    """The tokenizer that ``spec`` names; for "char" the sources are read once more."""
    if spec != "char":
        return load_tokenizer(spec)
    has_records = any(source.is_records for source in sources)
    end = _RECORD_END * has_records if document_end is None else document_end
    characters = set(end)
    for source in sources:
        for piece in source.pieces(0):
            characters |= set(piece.text)
    return load_tokenizer(spec, "".join(sorted(characters)))


def encoded(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    train_bytes: int,
    document_end: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, TokenArray]]:
    """(split, ids) of the sources in order, some megabytes at a time.

    Args:
        sources: What to encode.
        tokenizer: It encodes each piece by itself.
        train_bytes: Where in all sources the split "train" ends and "val" begins; records are cut
            between documents.
        document_end: What follows each document; None is nothing for a text, and for a record the
            tokenizer's end of a text, or a line end where it has none.
        progress: Called with the bytes that are encoded and those of all sources.
    """
    total = sum(source.num_bytes for source in sources)
    ends = {kind: _end(kind, tokenizer, document_end) for kind in {s.is_records for s in sources}}
    progress(0, total)
    for batch in _batches(_all_pieces(sources, train_bytes)):
        ids = tokenizer.encode_batch([piece.text for piece, _ in batch])
        for split, run in groupby(zip(batch, ids, strict=True), lambda pair: pair[0][0].split):
            parts = []
            for (piece, kind), piece_ids in run:
                parts += [piece_ids, ends[kind]] if piece.ends else [piece_ids]
            yield split, np.concatenate(parts)
        progress(batch[-1][0].position, total)
    progress(total, total)


def _end(is_record: bool, tokenizer: Tokenizer, document_end: str | None) -> TokenArray:
    if document_end is not None:
        return tokenizer.encode(document_end)
    nothing = tokenizer.encode("")
    if not is_record:
        return nothing
    end = end_of_text(tokenizer)
    return tokenizer.encode(_RECORD_END) if end is None else np.array([end], dtype=nothing.dtype)


def _all_pieces(sources: Sequence[Source], train_bytes: int) -> Iterator[tuple[Piece, bool]]:
    """Each piece, with its place in all sources, and whether it is of records."""
    start = 0
    for source in sources:
        cut = min(max(train_bytes - start, 0), source.num_bytes)
        for piece in source.pieces(cut):
            yield piece._replace(position=start + piece.position), source.is_records
        start += source.num_bytes


def _batches(pieces: Iterable[tuple[Piece, bool]]) -> Iterator[list[tuple[Piece, bool]]]:
    batch, size = [], 0
    for each in pieces:
        batch.append(each)
        size += len(each[0].text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record_pieces(path: Path, field: str, cut: int) -> Iterator[Piece]:
    for text, position in read_documents(path, field):
        split = "train" if position <= cut else "val"
        if len(text) * 4 <= PIECE_BYTES or len(data := text.encode("utf-8")) <= PIECE_BYTES:
            yield Piece(text, position, split, ends=True)
            continue
        for piece in _text_pieces(data, str(path), 0):
            yield piece._replace(position=position, split=split)


def _file_pieces(path: Path, cut: int) -> Iterator[Piece]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _text_pieces(data, str(path), cut)


def _text_pieces(data: bytes | mmap.mmap, origin: str, cut: int) -> Iterator[Piece]:
    """Pieces of about a megabyte, cut after a line end where there is one, and at ``cut``."""
    cut = _character_start(data, cut)
    for split, start, end in (("train", 0, cut), ("val", cut, len(data))):
        while start < end:
            stop = min(start + PIECE_BYTES, end)
            if stop < end:
                stop = data.rfind(b"\n", start, stop) + 1 or _character_start(data, stop)
            try:
                text = data[start:stop].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{origin} is not UTF-8 text (byte {start + error.start}): convert it, or "
                    "give another file."
                ) from None
            yield Piece(text, stop, split, ends=stop == len(data))
            start = stop


def _character_start(data: bytes | mmap.mmap, position: int) -> int:
    """The last start of a UTF-8 character at or before ``position``, or the end of the data."""
    for candidate in range(position, max(0, position - 4), -1):
        if candidate == len(data) or data[candidate] & 0xC0 != 0x80:
            return candidate
    return position
