"""A trained model on disk, as a checkpoint or as an export, and what it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qsdp import checkpoint
from qsdp.common.user_errors import UserError, quoted
from qsdp.data.tokenizer import hash_of
from qsdp.export import FACTS, check_export, load_export, read_facts
from qsdp.models.registry import family_of
from qsdp.models.size import ModelSize
from qsdp.oneshot.registry import DEFAULT
from qsdp.train.config import TrainConfig
from qsdp.train.config_file import typed_settings

_USED = (
    *("model", "data", "tokenizer", "seq_len", "batch_size", "eval_batches"),
    *("seed", "precision", "prunable", "text_field"),
)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk: where its weights lie, and what is known of its run."""

    path: Path
    target: str | None
    """What an export was compressed to; None for a checkpoint."""
    step: int
    config: TrainConfig
    """What concerns data and prunable set in the settings of the run that trained it."""
    world_size: int
    """Ranks of that run."""
    size: ModelSize
    has_tokenizer: bool
    """Whether a tokenizer beside it is its own."""
    method: str | None = None
    """The method that compressed an export; None for a checkpoint."""

    @property
    def tokenizer(self) -> str | None:
        """What ``load_corpus`` is to read text with."""
        stored = self.path / "tokenizer.json"
        if self.has_tokenizer and stored.is_file():
            return str(stored)
        return self.config.data.chosen_tokenizer

    def load(self, model: nn.Module) -> None:
        """Fill a sharded ``model``. A collective, which raises ValueError.

        Each file of an export is verified by one rank before any reads weights.
        """
        if self.target is None:
            checkpoint.load_model(self.path, model)
        else:
            check_export(self.path)
            load_export(self.path, model, is_checked=True)


def open_trained_model(path: Path) -> TrainedModel:
    """The trained model at ``path``: an export, a checkpoint, or the newest one of a run.

    Raises ValueError if it is none of these.
    """
    if (path / FACTS).is_file():
        facts = read_facts(path)
        source, target = facts["source"], facts["target"]
        config, size = facts["config"], facts["model"]
        step, world_size = source.get("step"), source.get("world_size")
        tokenizer = facts.get("tokenizer")
        has_tokenizer = checkpoint.lists(facts, "tokenizer.json")
        method = facts.get("method", DEFAULT)
    else:
        path, target, method = checkpoint.resolve(path), None, None
        meta = checkpoint.read_meta(path)
        fingerprint = meta.get("fingerprint")
        config, step, world_size = meta.get("config"), meta["step"], meta.get("world_size")
        fingerprint = fingerprint if isinstance(fingerprint, dict) else {}
        size, tokenizer = fingerprint.get("model"), fingerprint.get("tokenizer")
        has_tokenizer = checkpoint.lists(meta, "tokenizer.json")
    _check_tokenizer(path, tokenizer)
    try:
        settings = _settings(path, config)
        model = family_of(settings.run.model).size(size)
        num_ranks = int(world_size or 1)
        return TrainedModel(
            path, target, int(step), settings, num_ranks, model, has_tokenizer, method
        )
    except (UserError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} was not written by this version of qsdp train ({quoted(error)}): "
            "name another checkpoint."
        ) from None


def _settings(path: Path, config: Any) -> TrainConfig:
    """What a model's data and size are read from, of the settings of ``TrainConfig.as_dict``.

    The others may be such as no new run could have.
    """
    given = {name: config[name] for name in _USED if config.get(name) is not None}
    return TrainConfig.of(**typed_settings(path, given))


def _check_tokenizer(path: Path, stated: Any) -> None:
    """Raise ValueError unless the tokenizer beside a model is the one that was written there.

    Another would give other ids, and nobody would see it.
    """
    stored = path / "tokenizer.json"
    if stated in (None, hash_of("")):
        return
    if not stored.is_file():
        raise ValueError(f"{path} lacks tokenizer.json, which the model was trained with: copy it.")
    if hash_of(stored.read_text(encoding="utf-8", errors="replace")) != stated:
        raise ValueError(f"{stored} is not the one that the model was trained with: copy it again.")
