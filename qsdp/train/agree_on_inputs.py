"""The data of a run, and that all ranks were told the same: launchers have flags of their own."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch.distributed as dist

from qsdp.common.collective_errors import collective
from qsdp.common.flags import flag
from qsdp.common.user_errors import UserError
from qsdp.data.corpus import Corpus, load_corpus
from qsdp.data.flags import DataFlags
from qsdp.data.tokenizer import hash_of
from qsdp.report.progress import encoding_bar
from qsdp.train.config import TrainConfig
from qsdp.train.world import World

_SAMPLES = 64  # places in each split that are compared
_SAMPLE_TOKENS = 1024


def agree_on_config(config: TrainConfig, world: World) -> None:
    """Raise UserError, on every rank, unless all have the same settings: they would hang later."""
    difference = _first_difference(config.as_dict(), world)
    if difference is not None:
        name, values = difference
        raise UserError(
            f"{flag(name)} is {values}: give every launcher the same flags.",
            is_shared=True,
        )


def read_corpus(flags: DataFlags, tokenizer: str | None, world: World) -> Corpus:
    """The corpus of ``flags``, with a bar on rank 0's terminal while a large one is encoded."""
    with encoding_bar(is_shown=world.is_main) as progress:
        return load_corpus(flags.data, tokenizer, text_field=flags.text_field, progress=progress)


def agree_on_data(corpus: Corpus, world: World) -> dict[str, Any]:
    """What tells the corpus from others.

    Raises UserError, on every rank, unless all have read the same tokens, as far as is cheap, and
    tokens of the vocabulary.
    """
    facts = _facts(corpus)
    difference = _first_difference(facts, world)
    if difference is not None:
        name, values = difference
        raise UserError(
            f"the ranks do not read the same data, as the {name} is {values}: give every node the "
            "same files, and one Python if --data is stdlib.",
            is_shared=True,
        )
    world.together(corpus.check)
    return facts


def _facts(corpus: Corpus) -> dict[str, Any]:
    """Lengths of the splits, and hashes of samples."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        last = max(0, len(tokens) - _SAMPLE_TOKENS)
        for start in sorted({round(last * i / (_SAMPLES - 1)) for i in range(_SAMPLES)}):
            ids = np.asarray(tokens[start : start + _SAMPLE_TOKENS], dtype="<u4")
            digest.update(ids.tobytes())
    tokenizer = corpus.tokenizer
    return {
        "vocabulary": corpus.vocab_size,
        "length of the training split": len(corpus.train),
        "length of the validation split": len(corpus.val),
        "hash of the tokenizer": hash_of("" if tokenizer is None else tokenizer.to_json())[:8],
        "hash of a sample of the tokens": digest.hexdigest()[:8],
    }


def _first_difference(own: dict[str, Any], world: World) -> tuple[str, str] | None:
    """The first name whose values differ, and who has which: ``3 on rank 0 and 5 on rank 1``."""
    everyones: list[dict[str, Any]] = [{}] * world.size
    with collective("agreement on flags and data"):
        dist.all_gather_object(everyones, own)
    for name in dict.fromkeys(name for values in everyones for name in values):
        ranks: dict[str, list[str]] = {}
        for rank, values in enumerate(everyones):
            value = repr(values[name]) if name in values else "unset"
            ranks.setdefault(value, []).append(str(rank))
        if len(ranks) > 1:
            parts = [
                f"{value} on rank{'s' * (len(who) > 1)} {', '.join(who)}"
                for value, who in ranks.items()
            ]
            return name, " and ".join(parts)
    return None
