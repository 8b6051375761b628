"""The three splits of benchmarks/pruning/pruning.py, and a checkpoint's losses on one of them.

The last 5 % of the text are the test split, which no training sees: what stands before is all that
launch/train_gpt.py is given, and its first 90 % train, the rest validate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.pruning.pruning_methods import TARGETS
from benchmarks.support import machine
from qsdp.checkpoint import TensorReader
from qsdp.common.atomic_files import write_text
from qsdp.data.batches import eval_batches
from qsdp.data.corpus import load_corpus
from qsdp.data.token_shards import Tokens
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.model import GPT
from qsdp.oneshot.in_memory import compressed

TEST_FRACTION = 0.05
_BATCH_SIZE = 32  # of the test split; the loss does not depend on it


@dataclass(frozen=True)
class Texts:
    """What a training is given, and what its end is measured on."""

    train: Path
    """The text of the training and validation splits."""
    tokenizer: str
    """The tokenizer, as --tokenizer takes it."""
    test: Tokens
    vocab_size: int
    sha256: str
    """The digest of the whole text and the tokenizer."""


def split(paths: Sequence[Path], folder: Path, bpe_tokens: int | None) -> Texts:
    """Write the training text, and the tokenizer made from it, into ``folder``.

    Raises ValueError if the test text has a character that the training text has not.
    """
    data = b"".join(path.read_bytes() for path in paths)
    text = data.decode()
    cut = round(len(text) * (1 - TEST_FRACTION))
    train, tokenizer = folder / "train.txt", "char"
    write_text(train, text[:cut])
    if bpe_tokens is not None:
        tokenizer = str(folder / "tokenizer.json")
        definition = make_tokenizer(text[:cut], bpe_tokens)
        write_text(Path(tokenizer), definition)
        data += definition.encode()
    corpus = load_corpus(train, tokenizer)
    assert corpus.tokenizer is not None
    return Texts(
        train=train,
        tokenizer=tokenizer,
        test=corpus.tokenizer.encode(text[cut:]),
        vocab_size=corpus.vocab_size,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def make_tokenizer(text: str, num_tokens: int) -> str:
    """A byte-level BPE tokenizer trained on ``text``, as JSON of the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return str(tokenizer.to_str())


def losses_on_test(checkpoint: Path, model: str, texts: Texts, seq_len: int) -> dict[str, float]:
    """Nats a token of the test split: ``dense`` for the weights as they are, and by target."""
    gpt = GPT(GPTConfig.from_preset(model, vocab_size=texts.vocab_size))
    reader = TensorReader(checkpoint)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(reader.read(name))
    gpt.eval().to(machine.device())
    losses = {"dense": _loss(gpt, texts.test, seq_len)}
    for target in TARGETS:
        with compressed(gpt, target):
            losses[target] = _loss(gpt, texts.test, seq_len)
    return losses


@torch.no_grad()
def _loss(gpt: GPT, tokens: Tokens, seq_len: int) -> float:
    total, num_tokens, device = 0.0, 0, machine.device()
    for inputs_BT, targets_BT, count in eval_batches(tokens, _BATCH_SIZE, seq_len):
        _, loss = gpt(inputs_BT.to(device), targets_BT.to(device))
        total += count * loss.item()
        num_tokens += count
    return total / num_tokens
