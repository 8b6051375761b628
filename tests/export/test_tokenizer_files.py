"""What the files of a tokenizer state, some of which only other versions of the library heed."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from qsdp.data.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer
from qsdp.data.transformers_tokenizer import end_of_text, tokenizer_files

ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"]


def words(ends: list[str], *, special: bool = True, prefix: bool | None = None) -> LibraryTokenizer:
    """A tokenizer of words with these tokens, in this order of ids after two words."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    if prefix is not None:
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    add = library.add_special_tokens if special else library.add_tokens
    add(ends)
    return LibraryTokenizer(library.to_str())


def settings_of(tokenizer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(tokenizer_files(tokenizer, 8)["tokenizer_config.json"])
    return settings


@pytest.mark.parametrize("special", [True, False])
def test_of_several_ends_of_a_text_the_most_usual_one_counts(special: bool) -> None:
    for pair in itertools.permutations(ENDS, 2):
        tokenizer = words(["<x>", *pair], special=special)
        first = min(pair, key=ENDS.index)
        settings = settings_of(tokenizer)
        assert settings["bos_token"] == settings["eos_token"] == first
        assert end_of_text(tokenizer) == 3 + pair.index(first)
    assert end_of_text(words(["<x>"])) is None
    assert "eos_token" not in settings_of(words(["<x>"]))


@pytest.mark.parametrize("prefix", [True, False])
def test_whether_a_space_goes_before_a_text_is_stated(prefix: bool) -> None:
    assert settings_of(words([ENDS[0]], prefix=prefix))["add_prefix_space"] is prefix
    assert settings_of(ByteTokenizer())["add_prefix_space"] is False
    for tokenizer in (CharTokenizer("ab"), words([ENDS[0]])):
        assert "add_prefix_space" not in settings_of(tokenizer)
