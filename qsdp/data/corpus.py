"""Where the tokens of a run come from: text, records, the standard library, or token shards."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qsdp.data import pieces
from qsdp.data.records import check_kind, is_records
from qsdp.data.token_shards import SPLITS, Tokens, read_shards
from qsdp.data.tokenizer import Tokenizer, load_tokenizer

TRAIN_FRACTION = 0.9
STDLIB_BYTES = 8_000_000  # loads in about a second
# Tests and generated tables are no prose of programmers; lib2to3 left with Python 3.13.
_STDLIB_LEFT_OUT = {
    *("dist-packages", "site-packages", "test", "tests", "idle_test"),
    *("__phello__", "__pycache__", "encodings", "lib2to3", "pydoc_data"),
}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate on, and the tokenizer that made them."""

    train: Tokens
    """The training split: an array or a memory map of ids."""
    val: Tokens
    """The validation split, which the training split does not overlap."""
    tokenizer: Tokenizer | None
    """None for a folder of token shards that states none: such a corpus cannot be decoded."""
    vocab_size: int
    """Every id is below it."""

    @property
    def test_start(self) -> int:
        """Where in the validation split the test split begins: its last half, for final figures.

        What settings are chosen by must end before it.
        """
        return len(self.val) // 2

    def mistake(self) -> str | None:
        """What is wrong with the ids read so far, if anything; see ``TokenShards.mistake``."""
        found = (getattr(tokens, "mistake", None) for tokens in (self.train, self.val))
        return next((mistake for mistake in found if mistake is not None), None)

    def check(self) -> None:
        """Raise ValueError if an id that was read is outside the vocabulary."""
        if (mistake := self.mistake()) is not None:
            raise ValueError(mistake)


def load_corpus(
    spec: str | Path,
    tokenizer_spec: str | Path | None = None,
    stdlib_bytes: int = STDLIB_BYTES,
    text_field: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Corpus:
    """The corpus that ``spec`` names.

    What has to be encoded is cut as ``prepare_shards`` cuts it, so that both give the same ids.

    Args:
        spec: "stdlib", a UTF-8 text file, JSONL, parquet, or a folder of token shards. The first
            90 % of a text's tokens are the training split, the rest validate; records are split
            between documents, by their bytes.
        tokenizer_spec: As ``load_tokenizer`` takes it; None is "char" for a file, and for a folder
            the tokenizer that it was made with, from which no other may be chosen.
        stdlib_bytes: The most bytes of sources that "stdlib" reads.
        text_field: The field of JSONL or parquet that holds the texts; None is "text".
        progress: Called with the bytes that are encoded and those of all.

    Raises:
        ValueError: A file is missing, empty, damaged, not UTF-8 or of a kind that is not read, a
            folder is damaged, or a tokenizer cannot encode the text or is not the folder's.
    """
    path = Path(spec)
    is_folder = spec != "stdlib" and path.is_dir()
    has_records = not is_folder and is_records(spec)
    if text_field is not None and not has_records:
        raise ValueError(
            f"text_field is {text_field!r}, but {spec} is neither JSONL nor parquet: leave it out."
        )
    if is_folder:
        return _load_folder(path, tokenizer_spec)
    source = _records(path, text_field) if has_records else _text(spec, stdlib_bytes)
    tokenizer = pieces.tokenizer_of("char" if tokenizer_spec is None else tokenizer_spec, [source])
    size = source.num_bytes
    # A short text stays whole.
    cut = round(size * TRAIN_FRACTION) if has_records or size > pieces.PIECE_BYTES else 0
    parts = {split: [tokenizer.encode("")] for split in SPLITS}
    for split, ids in pieces.encoded([source], tokenizer, cut, progress=progress):
        parts[split].append(ids)
    train, val = (np.concatenate(parts[split]) for split in SPLITS)
    if not has_records:
        both = np.concatenate([train, val])
        num_train = int(len(both) * TRAIN_FRACTION)
        train, val = both[:num_train], both[num_train:]
    elif not len(train):
        raise ValueError(
            f"the first document of {spec} is more than {TRAIN_FRACTION:.0%} of it, so that none "
            "is left to train on: give more documents."
        )
    return Corpus(train, val, tokenizer, tokenizer.vocab_size)


def _records(path: Path, text_field: str | None) -> pieces.Source:
    _look_into(path)
    return pieces.file_source(path, text_field)


def _text(spec: str | Path, stdlib_bytes: int) -> pieces.Source:
    """The text of the standard library or of a UTF-8 file, its line ends untouched."""
    if spec == "stdlib":
        data, origin = _stdlib_text(stdlib_bytes), "the standard library"
    else:
        path, origin = Path(spec), str(spec)
        check_kind(path)
        _look_into(path)
        data = path.read_bytes()
    if not data:
        raise ValueError(f"{origin} holds no text: choose another --data.")
    return pieces.text_source(data, origin)


def _look_into(path: Path) -> None:
    """Raise ValueError for a file that cannot be read."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): choose 'stdlib', a file of text, JSONL or "
            "parquet, or a folder of token shards."
        ) from None


def _load_folder(folder: Path, tokenizer_spec: str | Path | None) -> Corpus:
    train, val, tokenizer, vocab_size = read_shards(folder)
    if tokenizer_spec is not None and not _is_the_tokenizer(tokenizer, vocab_size, tokenizer_spec):
        raise ValueError(
            f"the tokenizer {str(tokenizer_spec)!r} is not the one that {folder} was made with: "
            "leave --tokenizer unset, or prepare the folder again."
        )
    if tokenizer is None and tokenizer_spec is not None:
        tokenizer = load_tokenizer(tokenizer_spec)
    return Corpus(train, val, tokenizer, vocab_size)


def _is_the_tokenizer(stored: Tokenizer | None, vocab_size: int, spec: str | Path) -> bool:
    """Whether ``spec`` names the stored tokenizer, or one that fits where none is stored."""
    # A char tokenizer is made from the text, which a folder no longer has: its kind must do.
    if spec == "char":
        return stored is not None and '"kind": "char"' in stored.to_json()
    chosen = load_tokenizer(spec)
    if stored is None:
        return chosen.vocab_size <= vocab_size
    return chosen.to_json() == stored.to_json()


def _stdlib_text(max_bytes: int) -> bytes:
    """Sources of the running Python's standard library, as many whole files as fit.

    The files are ordered by a hash of their path, so that what fits, and each split, is a fair
    sample of the library and not its first letters. The same on every run with one Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
        names += [
            Path(folder, file).relative_to(root).as_posix()
            for file in files
            if file.endswith(".py")
        ]
    texts = []
    left = max_bytes
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        data = (root / name).read_bytes()
        if len(data) > left:
            continue
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:  # a source may declare another encoding
            continue
        texts.append(data)
        left -= len(data)
    return b"".join(texts)
