"""A folder of token shards: little-endian ids in flat files, and one meta.json that explains them.

    meta.json                  format, dtype, vocab_size, tokenizer, and the ids in every file
    train-00000.bin ...        uint16 or uint32 ids, nothing else
    val-00000.bin ...

The files are memory-mapped, so a corpus may exceed memory, and the processes of one machine share
its pages. Where meta.json counts the ids in files, those files are the corpus and no others; files
made elsewhere do as well: without counts all of them are read, and their sizes decide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qsdp.common.user_errors import quoted
from qsdp.data.tokenizer import TokenArray, Tokenizer, token_dtype, tokenizer_from_json

FORMAT = "qsdp-tokens-1"
SPLITS = ("train", "val")
_CHECKED_IDS = 1 << 16
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class Tokens(Protocol):
    """A sequence of token ids: an array, a memory map, or TokenShards."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Any:
        """The ids of a slice of consecutive tokens, as an array."""


class TokenRange:
    """Consecutive tokens of others, read where they lie."""

    def __init__(self, tokens: Tokens, start: int, stop: int) -> None:
        self._tokens = tokens
        self._start, self._stop, _ = slice(start, stop).indices(len(tokens))

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __getitem__(self, index: slice, /) -> Any:
        start, stop, step = index.indices(len(self))
        assert step == 1, "tokens are read in order"
        return self._tokens[self._start + start : self._start + max(start, stop)]

    @property
    def mistake(self) -> str | None:
        """What is wrong with the ids read so far, as ``TokenShards`` has it."""
        return getattr(self._tokens, "mistake", None)


class TokenShards:
    """Several arrays read as one long sequence; a slice may cross their borders."""

    def __init__(
        self, shards: Sequence[TokenArray], vocab_size: int | None = None, origin: str = "a shard"
    ) -> None:
        """Read an id that is not below ``vocab_size`` as 0: ``mistake`` tells of it."""
        self._shards = tuple(shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self._vocab_size = vocab_size
        self._origin = origin
        self.mistake: str | None = None
        """The first id outside the vocabulary that was read, in a sentence; None without one.
        No exception: the reader may be one rank of many, and all of them must stop at the same
        place.
        """

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice, /) -> TokenArray:
        start, stop, step = index.indices(len(self))
        assert step == 1, "token shards are read in order"
        if start >= stop:
            return self._shards[0][:0]
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for shard, offset in zip(self._shards[first:], self._starts[first:], strict=False):
            if offset >= stop:
                break
            pieces.append(shard[max(0, start - offset) : stop - offset])
        ids = np.concatenate(pieces) if len(pieces) != 1 else pieces[0]
        if self._vocab_size is not None and ids.max() >= self._vocab_size:
            largest = int(ids.argmax())
            self.mistake = self.mistake or (
                f"{self._origin} holds the token id {ids[largest]} (token {start + largest}), but "
                f"meta.json states a vocab_size of {self._vocab_size}: correct its dtype or "
                "vocab_size, or prepare the folder again with qsdp prepare."
            )
            ids = np.where(ids < self._vocab_size, ids, ids.dtype.type(0))
        return ids


def read_shards(folder: Path) -> tuple[Tokens, Tokens, Tokenizer | None, int]:
    """Map a folder of token shards: (train, val, tokenizer or None, vocab_size).

    Raises ValueError when meta.json is missing or damaged, a split has no file, or a file's size is
    not the one that meta.json states.
    """
    meta = _read_shards_meta(folder)
    dtype = _DTYPES[meta["dtype"]]
    splits = {}
    for split in SPLITS:
        counts = meta.get("num_tokens", {})
        found = sorted(file.name for file in folder.glob(f"{split}-*.bin"))
        # Files that are not counted are another corpus's, left by a copy over it.
        names = sorted(name for name in counts if name.startswith(f"{split}-")) if counts else found
        missing = [name for name in names if name not in found]
        if missing or not names:
            raise ValueError(
                f"{folder} lacks {missing[0] if missing else f'{split}-*.bin'}: copy it again, or "
                "prepare it again with qsdp prepare."
            )
        splits[split] = TokenShards(
            [
                _map_tokens(folder / name, dtype, counts.get(name), meta["vocab_size"])
                for name in names
            ],
            meta["vocab_size"],
            f"The {split} split in {folder}",
        )
    stored = meta.get("tokenizer")
    tokenizer = (
        tokenizer_from_json(json.dumps(stored), f"The tokenizer in {folder / 'meta.json'}")
        if stored
        else None
    )
    return splits["train"], splits["val"], tokenizer, meta["vocab_size"]


class ShardWriter:
    """Writes one folder of token shards: ``append`` ids to a split, then ``finish`` once.

    A folder without meta.json, which ``finish`` writes last, is not complete and is not read.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        dtype = token_dtype(tokenizer.vocab_size)
        self._dtype_name = dtype.name
        self._dtype = _DTYPES[dtype.name]
        self._counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}

    def append(self, split: str, ids: TokenArray) -> None:
        """Append ``ids`` to ``split``, opening a new file every ``shard_tokens`` ids."""
        counts = self._counts[split]
        while len(ids):
            name = next(reversed(counts), "")
            if not name or counts[name] == self._shard_tokens:
                name = f"{split}-{len(counts):05d}.bin"
                counts[name] = 0
            piece = ids[: self._shard_tokens - counts[name]]
            with (self._folder / name).open("ab") as file:
                file.write(piece.astype(self._dtype).tobytes())
            counts[name] += len(piece)
            ids = ids[len(piece) :]

    def finish(self) -> dict[str, int]:
        """Write meta.json and return the number of tokens of each split."""
        meta = {
            "format": FORMAT,
            "dtype": self._dtype_name,
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer": json.loads(self._tokenizer.to_json()),
            "num_tokens": {k: v for counts in self._counts.values() for k, v in counts.items()},
        }
        path = self._folder / "meta.json"
        path.write_text(json.dumps(meta, ensure_ascii=False) + "\n", encoding="utf-8")
        return {split: sum(counts.values()) for split, counts in self._counts.items()}


def _map_tokens(
    file: Path, dtype: np.dtype[Any], num_tokens: int | None, vocab_size: int
) -> TokenArray:
    if not file.is_file():
        raise ValueError(
            f"{file} is not a file of token ids: copy the folder again, or prepare it again with "
            "qsdp prepare."
        )
    size = file.stat().st_size
    if size % dtype.itemsize or (num_tokens is not None and size != num_tokens * dtype.itemsize):
        stated = f"{num_tokens} ids of" if num_tokens is not None else "a whole number of ids of"
        raise ValueError(
            f"{file} has {size} bytes, but should hold {stated} {dtype.itemsize} bytes: copy it "
            "again, or prepare it again with qsdp prepare."
        )
    if not size:  # mmap refuses an empty file
        return np.empty(0, dtype=dtype)
    ids = np.memmap(file, dtype=dtype, mode="r")
    # Reading all of it would take minutes, but a wrong dtype or vocabulary shows at once.
    largest = int(ids[:_CHECKED_IDS].max())
    if largest >= vocab_size:
        raise ValueError(
            f"{file} holds the token id {largest}, but meta.json states a vocab_size of "
            f"{vocab_size}: correct its dtype or vocab_size."
        )
    return ids


def _read_shards_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no meta.json, so it is no complete folder of token shards: make one "
            "with qsdp prepare."
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable JSON ({quoted(error)}): write it again."
        ) from None
    match meta:
        # To Python, true is an int: not to a user.
        case {"dtype": "uint16" | "uint32" as dtype, "vocab_size": int(vocab_size)} if (
            type(vocab_size) is int and 0 < vocab_size <= 1 << 8 * _DTYPES[dtype].itemsize
        ):
            match meta.get("num_tokens", {}):
                case dict(counts) if all(type(n) is int for n in counts.values()):
                    return meta
    raise ValueError(
        f"{path} lacks a dtype 'uint16' or 'uint32' or a vocab_size from 1 to the number of ids "
        "that the dtype holds, or its num_tokens are not numbers: write it again, or prepare the "
        "folder again with qsdp prepare."
    )
