"""Our tokenizers as files that the transformers library loads, with the same ids."""

from __future__ import annotations

import json
from typing import Any

from qsdp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

# The first of these that a tokenizer has.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_BYTES = 256


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, str]:
    """The texts of tokenizer.json and tokenizer_config.json, by file name.

    ``AutoTokenizer`` makes of them what gives the ids of ``tokenizer`` and decodes them.
    ``context`` is the longest sequence of the model, in tokens.
    """
    definition = _library_definition(tokenizer)
    settings: dict[str, Any] = {
        # Any class of GPT-2's would put its own pre-tokenizer in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # GPT-2 would add the embedding of token 0 to each token for the zeros of token_type_ids.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if "add_prefix_space" in (first := definition["pre_tokenizer"] or {}):
        # Older versions of the library put their default in place of the file's.
        settings["add_prefix_space"] = first["add_prefix_space"]
    if (end := _end_of_text(definition)) is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token"), end["content"])
    return {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of the added token that ends a text, by its usual names; None if there is none.

    Of several it is the first of these names. Whether it is marked as special is not asked.
    """
    end = _end_of_text(_library_definition(tokenizer))
    return None if end is None else int(end["id"])


def _end_of_text(definition: dict[str, Any]) -> dict[str, Any] | None:
    ends = [token for token in definition["added_tokens"] if token["content"] in _ENDS]
    return min(ends, key=lambda token: _ENDS.index(token["content"]), default=None)


def _library_definition(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the ``tokenizers`` library reads."""
    definition: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
    }
    match tokenizer:
        case CharTokenizer():
            vocabulary = {character: i for i, character in enumerate(tokenizer.vocabulary)}
            # No character is this long: an unknown one is an error, as it is for us.
            model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
            pattern = {"Regex": r"[\s\S]"}  # a dot would leave line ends out
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            return definition | {
                "pre_tokenizer": split,
                "decoder": {"type": "Fuse"},
                "model": model,
            }
        case ByteTokenizer():
            level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
            level["use_regex"] = False
            vocabulary = {_letter(byte): byte for byte in range(_BYTES)}
            return definition | {
                "pre_tokenizer": level,
                "decoder": level,
                "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            }
        case _:
            stored: dict[str, Any] = json.loads(tokenizer.to_json())["definition"]
            # Ours adds no special tokens, which is what a post-processor is for.
            return stored | {"post_processor": None}


def _letter(byte: int) -> str:
    """The character by which byte-level BPE shows a byte: itself where it is a visible one."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in visible:
        return chr(byte)
    return chr(_BYTES + [b for b in range(_BYTES) if b not in visible].index(byte))
