"""Text files to a folder of token shards, in pieces: neither ever lies in memory as a whole."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qsdp.common.atomic_files import atomic_folder
from qsdp.data.corpus import TRAIN_FRACTION
from qsdp.data.token_shards import ShardWriter
from qsdp.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer

PIECE_BYTES = 1 << 20


def prepare_shards(
    texts: Sequence[Path],
    out: Path,
    tokenizer_spec: str | Path,
    *,
    val_fraction: float = 1 - TRAIN_FRACTION,
    shard_tokens: int = 100_000_000,
    document_end: str = "",
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, int]:
    """Encode text files, in the order given, into the new folder ``out``.

    The text is encoded in pieces of about a megabyte, cut after a line end where there is one, so a
    token never spans a cut's two lines. A folder that is there is whole: see ``atomic_folder``.

    Args:
        texts: UTF-8 files.
        out: The folder to make; it must not exist, or be empty.
        tokenizer_spec: As ``load_tokenizer`` takes it; "char" reads the files once more.
        val_fraction: How much of the bytes, at the end, validate.
        shard_tokens: The most ids in one file.
        document_end: Text appended to each file, for example a tokenizer's "<|endoftext|>".
        progress: Called with the number of bytes that were just encoded.

    Returns:
        The number of tokens, of "train" and of "val".

    Raises:
        ValueError: A file is missing, empty or not UTF-8, ``out`` is in use, or a number is out of
            range.
    """
    if not texts:
        raise ValueError("no text file was given: give at least one.")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: choose a number between 0 and 1.")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}: choose 1 or more.")
    sizes = [_file_bytes(path) for path in texts]
    tokenizer = _tokenizer(tokenizer_spec, texts, document_end)

    with atomic_folder(out) as partial:
        writer = ShardWriter(partial, tokenizer, shard_tokens)
        train_left = round(sum(sizes) * (1 - val_fraction))
        for path, size in zip(texts, sizes, strict=True):
            for text, num_bytes, split in _pieces(path, cut=min(max(train_left, 0), size)):
                writer.append(split, tokenizer.encode(text))
                progress(num_bytes)
            train_left -= size
            writer.append(split, tokenizer.encode(document_end))
        num_tokens = writer.finish()
        if not all(num_tokens.values()):
            raise ValueError(
                f"the texts are too short to be split, as {num_tokens['train']} tokens would be "
                f"left to train on and {num_tokens['val']} to validate on: give more text, or "
                "another val_fraction."
            )
    return num_tokens


def _tokenizer(spec: str | Path, texts: Sequence[Path], document_end: str) -> Tokenizer:
    if spec != "char":
        return load_tokenizer(spec)
    characters = set(document_end)
    for path in texts:
        for text, _, _ in _pieces(path, cut=0):
            characters |= set(text)
    return CharTokenizer(characters)


def _file_bytes(path: Path) -> int:
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"the text {path} {state}: give files that exist.")
    size = path.stat().st_size
    if not size:  # which mmap refuses
        raise ValueError(f"{path} is empty: leave it out.")
    return size


def _pieces(path: Path, cut: int) -> Iterator[tuple[str, int, str]]:
    """(text, its bytes, its split) of pieces in order: "train" up to byte ``cut``, then "val"."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
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
                        f"{path} is not UTF-8 text (byte {start + error.start}): convert it, or "
                        "leave it out."
                    ) from None
                yield text, stop - start, split
                start = stop


def _character_start(data: mmap.mmap, position: int) -> int:
    """The last start of a UTF-8 character at or before ``position``, or the end of the data."""
    for candidate in range(position, max(0, position - 4), -1):
        if candidate == len(data) or data[candidate] & 0xC0 != 0x80:
            return candidate
    return position
