"""Text to token ids and back: characters, bytes, or any file of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qsdp.common.user_errors import quoted

TokenArray = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    """What every tokenizer does: ``to_json`` and ``tokenizer_from_json`` are inverses."""

    vocab_size: int

    def encode(self, text: str) -> TokenArray:
        """Ids of ``text``, in ``token_dtype(vocab_size)``. Raises ValueError for what has no id."""

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of each text, as ``encode`` gives them; the library's tokenizers use all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``. Raises ValueError for an id outside 0..vocab_size - 1."""

    def to_json(self) -> str:
        """One JSON object that ``tokenizer_from_json`` and ``load_tokenizer`` read."""


def hash_of(definition: str) -> str:
    """SHA-256 of what ``Tokenizer.to_json`` gave; of "" where there is no tokenizer."""
    return hashlib.sha256(definition.encode("utf-8", "surrogatepass")).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The dtype of a tokenizer's ids: the narrowest of uint16 and uint32 that holds all."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class CharTokenizer:
    """One id a character of ``vocabulary``, in the order of the code points."""

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self.vocabulary = "".join(sorted(set(vocabulary)))
        self.vocab_size = len(self.vocabulary)
        if not self.vocabulary:
            raise ValueError("a char tokenizer was given no text: give it at least one character.")
        self._code_points = _code_points(self.vocabulary)
        # Code point -> id, vocab_size where there is none. The last entry stands for all above.
        self._ids = np.full(int(self._code_points[-1]) + 2, self.vocab_size, dtype=np.uint32)
        self._ids[self._code_points] = np.arange(self.vocab_size)

    def encode(self, text: str) -> TokenArray:
        """Ids of ``text``, a character each. Raises ValueError for one that is unknown."""
        code_points = _code_points(text)
        ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if len(unknown):
            raise ValueError(
                f"the text holds {text[unknown[0]]!r} at character {unknown[0]}, which is not "
                f"among the {self.vocab_size} characters of this char tokenizer: leave it out, "
                "or use the byte tokenizer."
            )
        return ids.astype(token_dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of each text, one after the other."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. Raises ValueError for one that is none."""
        return "".join(self.vocabulary[i] for i in _checked_token_ids(ids, self.vocab_size))

    def to_json(self) -> str:
        """JSON of the vocabulary, of which ``tokenizer_from_json`` makes this again."""
        return json.dumps({"kind": "char", "vocabulary": self.vocabulary})


class ByteTokenizer:
    """The 256 values of a byte, of the text's UTF-8 form."""

    vocab_size = 256

    def encode(self, text: str) -> TokenArray:
        """Ids of ``text``, a byte of its UTF-8 form each. Raises ValueError for lone surrogates."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds {text[error.start]!r} at character {error.start}, which UTF-8 "
                "cannot express: leave it out."
            ) from None
        return np.frombuffer(data, dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of each text, one after the other."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text, where bytes that are not UTF-8 become U+FFFD: models sample any."""
        return bytes(_checked_token_ids(ids, self.vocab_size)).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """JSON that says that these are bytes."""
        return json.dumps({"kind": "byte"})


class LibraryTokenizer:
    """A tokenizer of Hugging Face's ``tokenizers`` library, from the JSON text of its file.

    Adds no special tokens of its own, but recognises those that stand in the text.
    """

    def __init__(self, definition: str, origin: str = "this") -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(
                f"{origin} is a file for the tokenizers library, which is not installed: "
                "run 'pip install tokenizers', or choose 'char' or 'byte'."
            ) from None
        try:
            self._library = Library.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{origin} is no tokenizer that the tokenizers library can read ({quoted(error)}): "
                "give the tokenizer.json of a model, or choose 'char' or 'byte'."
            ) from None
        self._origin = origin
        # A file may truncate or pad for the model that it came from; a corpus must stay whole.
        self._library.no_truncation()
        self._library.no_padding()
        # Ids may have gaps: the largest one, not their number, decides how many the model needs.
        ids = self._library.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"{origin} has an empty vocabulary: train it first.")

    def encode(self, text: str) -> TokenArray:
        """Ids of ``text``. Raises ValueError for what the library has no id for."""
        return self._encoded(lambda: [self._library.encode(text, add_special_tokens=False)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of each text, by this rank's share of the cores, unless the environment has another.

        Raises ValueError for what the library has no id for.
        """
        _share_cores()
        # The fast one, which old versions lack, makes no offsets: half the time and memory.
        encode = getattr(self._library, "encode_batch_fast", self._library.encode_batch)
        return self._encoded(lambda: encode(list(texts), add_special_tokens=False))

    def _encoded(self, encode: Callable[[], Any]) -> list[TokenArray]:
        try:
            encodings = encode()
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{self._origin} cannot encode the text ({quoted(error)}): give a tokenizer that "
                "has an id for all of it, or choose 'char' or 'byte'."
            ) from None
        dtype = token_dtype(self.vocab_size)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, special tokens too. Raises ValueError for one that is none."""
        checked = _checked_token_ids(ids, self.vocab_size)
        return str(self._library.decode(checked, skip_special_tokens=False))

    def to_json(self) -> str:
        """JSON of the library's own definition."""
        return json.dumps(
            {"kind": "tokenizers", "definition": json.loads(self._library.to_str())},
            ensure_ascii=False,
        )


def load_tokenizer(spec: str | Path, text: str | None = None) -> Tokenizer:
    """The tokenizer that ``spec`` names.

    ``spec`` is "char" (one id for each character of ``text``), "byte", or the path of a JSON file:
    one of the ``tokenizers`` library, or what ``to_json`` wrote. Raises ValueError for a missing or
    unreadable file, and for "char" without text.
    """
    if spec == "char":
        return CharTokenizer(text or "")
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    if not path.is_file():
        raise ValueError(
            f"there is no tokenizer {str(spec)!r}: choose 'char', 'byte', or the path of a "
            "tokenizers JSON file."
        )
    try:
        definition = path.read_text(encoding="utf-8")
        fields = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a JSON file ({quoted(error)}): give the tokenizer.json of a model, or "
            "choose 'char' or 'byte'."
        ) from None
    if isinstance(fields, dict) and "kind" in fields:
        return tokenizer_from_json(definition, str(path))
    return LibraryTokenizer(definition, str(path))


def tokenizer_from_json(text: str, origin: str = "the tokenizer") -> Tokenizer:
    """The tokenizer whose ``to_json`` gave ``text``; ``origin`` names it in errors.

    Raises ValueError for a text that no ``to_json`` wrote.
    """
    try:
        match json.loads(text):
            case {"kind": "char", "vocabulary": str(vocabulary)}:
                return CharTokenizer(vocabulary)
            case {"kind": "byte"}:
                return ByteTokenizer()
            case {"kind": "tokenizers", "definition": dict(definition)}:
                return LibraryTokenizer(json.dumps(definition), origin)
    except (json.JSONDecodeError, RecursionError):
        pass
    raise ValueError(f"{origin} was not written by qsdp, or is damaged: write it again.")


def _share_cores() -> None:
    """Let the library's threads, which it counts at its first use, be this rank's share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:  # alone, it takes all cores that it may
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ranks
        share = max(1, min(allowed, (os.cpu_count() or 1) // ranks))
        os.environ.setdefault("RAYON_NUM_THREADS", str(share))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _checked_token_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [int(i) for i in ids]
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"token id {i} is outside the tokenizer's 0..{vocab_size - 1}: decode with the "
                "tokenizer that the model was trained with."
            )
    return checked
