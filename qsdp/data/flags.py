"""The flags that say what is read. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qsdp.common.flags import Flags
from qsdp.data.records import is_records


@dataclass(frozen=True, kw_only=True)
class DataFlags(Flags):
    """What is trained on."""

    data: str = "stdlib"
    """What to train on: stdlib (sources of Python's standard library), a file, or a folder.
    A file is text, JSONL (.jsonl, .jsonl.gz: one object a line) or parquet (.parquet). A folder
    holds token shards (train-*.bin, val-*.bin, meta.json).
    """

    tokenizer: str | None = None
    """char, byte, or a JSON file of the tokenizers library.
    Unset: byte for stdlib, char for a file, and the folder's own for token shards.
    """

    text_field: str | None = None
    """The field of JSONL or parquet that holds the texts, each a document. Unset: text."""

    @property
    def chosen_tokenizer(self) -> str | None:
        """The tokenizer that the data is read with, as ``load_corpus`` takes it."""
        return "byte" if self.tokenizer is None and self.data == "stdlib" else self.tokenizer

    @property
    def identity(self) -> dict[str, str | None]:
        """What tells inputs apart, wherever the run is started from."""
        paths = {"data": self.data, "tokenizer": self.tokenizer}
        found = {
            name: text if text is None or text in _NO_PATHS else str(Path(text).absolute())
            for name, text in paths.items()
        }
        # Names of folders were made without it.
        return found | ({} if self.text_field is None else {"text_field": self.text_field})

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what cannot be."""
        self.require("data", self.data != "", "give stdlib, a file or a folder of shards")
        self.require("tokenizer", self.tokenizer != "", "choose char, byte or a JSON file")
        self.require_contents("text_field")
        if self.text_field is not None and not is_records(self.data):
            raise ValueError(
                f"--text-field is {self.text_field!r}, but --data {self.data} is neither JSONL "
                "(.jsonl, .jsonl.gz) nor parquet (.parquet): leave it out."
            )


_NO_PATHS = ("stdlib", "char", "byte")
