"""Data: text to tokens, tokens to files, files to batches."""

from __future__ import annotations

from qsdp.data.batches import Batches, eval_batches
from qsdp.data.corpus import Corpus, load_corpus
from qsdp.data.token_shards import TokenRange, Tokens, TokenShards
from qsdp.data.tokenize_corpus import prepare_shards
from qsdp.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_json

__all__ = [
    "Batches",
    "Corpus",
    "TokenRange",
    "TokenShards",
    "Tokenizer",
    "Tokens",
    "eval_batches",
    "load_corpus",
    "load_tokenizer",
    "prepare_shards",
    "tokenizer_from_json",
]
