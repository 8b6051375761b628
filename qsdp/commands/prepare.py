"""Encode text, JSONL and parquet into a folder of memory-mapped token shards, for --data.

qsdp prepare --texts a.txt b.jsonl c.parquet --out shards --tokenizer tokenizer.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qsdp.commands.exit import one_sentence_at_the_end
from qsdp.commands.parsing import check_one_process, given_flags, one_sentence, with_flag
from qsdp.common.user_errors import UserError, sentence
from qsdp.data.corpus import TRAIN_FRACTION
from qsdp.data.tokenize_corpus import prepare_shards


@dataclass(frozen=True)
class PrepareFlags:
    """The flags of the command that prepares token shards."""

    texts: tuple[Path, ...]
    """UTF-8 text, JSONL (.jsonl, .jsonl.gz) and parquet files, encoded in this order.
    JSONL has one object a line. Each record of JSONL and of parquet is a document.
    """
    out: Path
    """The folder to make."""
    tokenizer: str = "byte"
    """char, byte, or the path of a tokenizers JSON file."""
    val_fraction: float = round(1 - TRAIN_FRACTION, 6)
    """How much of the text, at its end, is for validation. Records are cut between documents."""
    shard_tokens: int = 100_000_000
    """The most tokens in one file."""
    document_end: str | None = None
    """Text appended to each text file and each record, such as <|endoftext|>.
    Unset: nothing after a text file, and after a record the tokenizer's end of a text (a line end
    where it has none).
    """
    text_field: str | None = None
    """The field of JSONL or parquet that holds the texts. Unset: text."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare token shards as ``argv`` says. Exits with 2, in one sentence, on a user's mistake."""
    with one_sentence_at_the_end("nothing was written"):
        flags = one_sentence(lambda: tyro.cli(PrepareFlags, args=argv, description=__doc__))
        if given_flags(argv).count("texts") > 1:
            raise UserError("--texts is given twice: name all files after one.")
        check_one_process()
        try:
            prepare(flags)
        except (ValueError, OSError) as error:
            text = with_flag(sentence(error), ("val_fraction", "shard_tokens", "text_field"))
            raise UserError(text) from None


def prepare(options: PrepareFlags) -> None:
    """Prepare the token shards that ``options`` describe, and show how far it is."""
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=None)
        num_tokens = prepare_shards(
            options.texts,
            options.out,
            options.tokenizer,
            val_fraction=options.val_fraction,
            shard_tokens=options.shard_tokens,
            document_end=options.document_end,
            text_field=options.text_field,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(
        f"{options.out}: {num_tokens['train']:,} tokens to train on, "
        f"{num_tokens['val']:,} to validate on"
    )
