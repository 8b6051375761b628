"""Validation: the loss of the model as it is, and after compressing it in one shot."""

from __future__ import annotations

from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule

from qsdp.common.gpu_streams import to_device
from qsdp.data.batches import eval_batches
from qsdp.data.corpus import Corpus
from qsdp.models.generate import generate
from qsdp.models.language_model import LanguageModel
from qsdp.oneshot.in_memory import compressed
from qsdp.sparsity.local_shards import local_shard
from qsdp.sparsity.prunable import prunable_parameters
from qsdp.train.config import TrainConfig
from qsdp.train.wire_bytes import Wire, threshold_bytes
from qsdp.train.world import World

_PROMPT_TOKENS = 16
_SAMPLE_TOKENS = 200
_GATHERED_BYTES = 2 << 30  # what a sample may hold on every rank, beside the shards


class Evaluator:
    """Evaluates one model on the validation split; every method is called on all ranks alike."""

    def __init__(
        self, config: TrainConfig, world: World, corpus: Corpus, model: LanguageModel, wire: Wire
    ) -> None:
        self._config = config
        self._world = world
        self._corpus = corpus
        self._model = model
        self._wire = wire

    def loss(self, *, exact: bool = True) -> float:
        """Mean cross-entropy in nats a token, of the exact weights or of those off the wire."""
        config, world = self._config, self._world
        batches = eval_batches(
            self._corpus.val,
            config.run.batch_size,
            config.run.seq_len,
            config.output.eval_batches,
            world.rank,
            world.size,
        )
        device = world.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        num_tokens = 0
        self._model.eval()
        with torch.no_grad(), self._wire.evaluation(exact):
            for inputs_BT, targets_BT, count in batches:
                inputs_BT, targets_BT = (to_device(t, device) for t in (inputs_BT, targets_BT))
                _, loss = self._model(inputs_BT, targets_BT)
                loss_sum += count * loss.double()
                num_tokens += count
            self._reshard()
        self._model.train()
        is_wrong = self._corpus.mistake() is not None
        total, total_tokens, num_wrong = world.sum(loss_sum, num_tokens, is_wrong)
        if num_wrong:
            world.together(self._corpus.check)
        return total / total_tokens

    def one_shot(self) -> dict[str, float]:
        """The exact weights' loss after compression, by target; weights are put back.

        Those are left out that were still to come when the ranks agreed that the run is to end.
        """
        losses = {}
        num_shards = self._world.size // self._config.run.replicas
        for target in self._config.compression.targets:
            if self._world.stop.is_agreed:
                break
            with compressed(self._model, target, self._config.compression.patterns) as parameters:
                self._wire.other(threshold_bytes(target, len(parameters), num_shards))
                losses[str(target)] = self.loss()
        return losses

    def sparsity(self) -> dict[str, float]:
        """The fraction of exact zeros among the prunable weights, and among all."""
        prunable = {
            id(p)
            for p in prunable_parameters(self._model, self._config.compression.patterns).values()
        }
        zeros, numels = [0, 0], [0, 0]
        for parameter in self._model.parameters():
            values, is_prunable = local_shard(parameter).values, id(parameter) in prunable
            zeros[is_prunable] += int((values == 0).sum())
            numels[is_prunable] += values.numel()
        other_zeros, set_zeros, others, in_set = self._world.sum(*zeros, *numels)
        return {
            "prunable": set_zeros / in_set,
            "model": (set_zeros + other_zeros) / (in_set + others),
        }

    def sample(self) -> str | None:
        """A validation prompt, continued by the exact weights.

        None if it cannot be decoded, or if the training has diverged.

        A model that fits stays gathered from token to token; a large one would cross the wire whole
        for each, so its sample is short.
        """
        tokenizer = self._corpus.tokenizer
        if tokenizer is None:
            return None
        model = self._model
        fits = sum(4 * p.numel() for p in model.parameters()) <= _GATHERED_BYTES
        prompt = [int(i) for i in self._corpus.val[:_PROMPT_TOKENS]]
        tokens_1T = torch.tensor([prompt], device=self._world.device)
        with self._wire.evaluation(exact=True):
            self._reshard_after_forward(not fits)
            num_tokens = _SAMPLE_TOKENS if fits else _SAMPLE_TOKENS // 10
            try:
                ids_1T = generate(model, tokens_1T, num_tokens, 0.8, 50, self._config.run.seed)
            except FloatingPointError:
                return None
            finally:
                self._reshard_after_forward(True)
                self._reshard()
        # A vocabulary padded for speed has ids that stand for no text.
        return tokenizer.decode([i for i in ids_1T[0].tolist() if i < tokenizer.vocab_size])

    def _reshard_after_forward(self, is_on: bool) -> None:
        for block in self._model.blocks:
            cast(FSDPModule, block).set_reshard_after_forward(is_on)

    def _reshard(self) -> None:
        # After a forward without backward the root stays gathered, and the next training pass would
        # compute with these weights and not with those that its own gather brings.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
