"""The flags that say what is read. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qsdp.common.flags import Flags


@dataclass(frozen=True, kw_only=True)
class DataFlags(Flags):
    """What is trained on."""

    data: str = "stdlib"
    """What to train on: stdlib (sources of Python's standard library), a text file, or a folder.
    A folder holds token shards (train-*.bin, val-*.bin, meta.json).
    """

    tokenizer: str | None = None
    """char, byte, or a JSON file of the tokenizers library.
    Unset: byte for stdlib, char for a text file, and the folder's own for token shards.
    """

    @property
    def chosen_tokenizer(self) -> str | None:
        """The tokenizer that the data is read with, as ``load_corpus`` takes it."""
        return "byte" if self.tokenizer is None and self.data == "stdlib" else self.tokenizer

    @property
    def identity(self) -> dict[str, str | None]:
        """What tells inputs apart, wherever the run is started from."""
        return {
            name: text if text in (None, *_NO_PATHS) else str(Path(text).absolute())
            for name, text in self.values().items()
        }

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what cannot be."""
        self.require("data", self.data != "", "give stdlib, a text file or a folder of shards")
        self.require("tokenizer", self.tokenizer != "", "choose char, byte or a JSON file")


_NO_PATHS = ("stdlib", "char", "byte")
