"""Files to a folder of token shards, in pieces: neither ever lies in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qsdp.common.atomic_files import atomic_folder
from qsdp.data.corpus import TRAIN_FRACTION
from qsdp.data.pieces import encoded, file_source, tokenizer_of
from qsdp.data.token_shards import ShardWriter


def prepare_shards(
    texts: Sequence[Path],
    out: Path,
    tokenizer_spec: str | Path,
    *,
    val_fraction: float = 1 - TRAIN_FRACTION,
    shard_tokens: int = 100_000_000,
    document_end: str | None = None,
    text_field: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Encode files of text, JSONL or parquet, in the order given, into the new folder ``out``.

    The text is encoded in pieces of about a megabyte, cut after a line end where there is one, so a
    token never spans a cut's two lines. A folder that is there is whole: see ``atomic_folder``.

    Args:
        texts: UTF-8 text, JSONL or parquet, told apart by their names.
        out: The folder to make; it must not exist, or be empty.
        tokenizer_spec: As ``load_tokenizer`` takes it; "char" reads the files once more.
        val_fraction: How much of the bytes, at the end, validate; records are cut between
            documents.
        shard_tokens: The most ids in one file.
        document_end: Text appended to each text file and record, for example a tokenizer's
            "<|endoftext|>". None is nothing for a text file, and for a record the tokenizer's end
            of a text, or a line end where it has none.
        text_field: The field of JSONL or parquet that holds the texts; None is "text".
        progress: Called with the bytes that are encoded and those of all files.

    Returns:
        The number of tokens, of "train" and of "val".

    Raises:
        ValueError: A file is missing, empty, damaged, not UTF-8 or of a kind that is not read,
            ``out`` is in use, or a number is out of range.
    """
    if not texts:
        raise ValueError("no text file was given: give at least one.")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: choose a number between 0 and 1.")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}: choose 1 or more.")
    sources = [file_source(path, text_field) for path in texts]
    if text_field is not None and not any(source.is_records for source in sources):
        raise ValueError(
            f"text_field is {text_field!r}, but no file is JSONL or parquet: leave it out."
        )
    tokenizer = tokenizer_of(tokenizer_spec, sources, document_end)
    train_bytes = round(sum(source.num_bytes for source in sources) * (1 - val_fraction))

    with atomic_folder(out) as partial:
        writer = ShardWriter(partial, tokenizer, shard_tokens)
        for split, ids in encoded(sources, tokenizer, train_bytes, document_end, progress):
            writer.append(split, ids)
        num_tokens = writer.finish()
        if not all(num_tokens.values()):
            raise ValueError(
                f"the texts are too short to be split, as {num_tokens['train']} tokens would be "
                f"left to train on and {num_tokens['val']} to validate on: give more text, or "
                "another val_fraction."
            )
    return num_tokens
