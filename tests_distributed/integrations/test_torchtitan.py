"""torchtitan: its own Trainer, with a small Llama 3, trains under the wire and resumes bit for bit.

torchtitan knows no CPU: it is told here that one is the device, and spared what asks a GPU for its
memory. All else is torchtitan's own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._utils
import torch.distributed as dist
from torch import Tensor, nn

import qsdp
from tests_distributed.support.running import Run

why = "torchtitan is not installed: make test-integrations"
with patch.object(torch._utils, "_get_available_device_type", lambda: "cpu"):
    pytest.importorskip("torchtitan", reason=why)
    pytest.importorskip("triton", reason="torchtitan's models need triton: make test-integrations")
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import DeviceMemStats, MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.utils import clip_grad_norm_
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry
    from torchtitan.trainer import Trainer

    from qsdp.integrations import torchtitan

STEPS, HALF, LENGTH, VOCAB = 30, 15, 16, 2048
MAX_NORM = 0.5
KINDS = [pytest.param("plain", marks=pytest.mark.heavy), "acdc", "cram"]


class Memory:
    """What a GPU would say of its memory."""

    device_name, device_capacity_gib = "H100", 1.0

    def get_peak_stats(self) -> Any:
        return DeviceMemStats(*[0] * 6)

    def reset_peak_stats(self) -> None: ...


class Tokenizer(BaseTokenizer):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config): ...

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCAB


def batch(index: int) -> tuple[dict[str, Tensor], Tensor]:
    """One rank's micro-batch: which token follows."""
    generator = torch.Generator().manual_seed(97 * index + dist.get_rank())
    start = torch.randint(VOCAB, (2, 1), generator=generator)
    tokens = (start + 3 * torch.arange(LENGTH + 1)) % 96
    return {"input": tokens[:, :-1]}, tokens[:, 1:]


class Batches(BaseDataLoader):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config): ...

    def __init__(self, config: Any, **_: Any) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.at += 1
            yield batch(self.at - 1)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


METHODS: dict[str, Any] = {
    "plain": None,
    "acdc": lambda model, base: qsdp.ACDC(model, base, schedule=STEPS, target=0.5),
    "cram": lambda model, base: qsdp.CrAM(model, base, sparsity=0.5),
}


def spec_of(kind: str) -> Any:
    spec = model_registry("debugmodel")
    layers = spec.model.layers[:2]
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    spec.model.layers = layers
    return torchtitan.wrap_spec(spec, qsdp.QSDPConfig(), METHODS[kind])


def trainer_of(kind: str, folder: str, *, accumulate: int = 1, **others: Any) -> Any:
    size = dist.get_world_size()
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    config = Trainer.Config(
        model_spec=others.pop("spec", None) or spec_of(kind),
        dump_folder=folder,
        loss=CrossEntropyLoss.Config(),
        tokenizer=Tokenizer.Config(),
        dataloader=Batches.Config(),
        optimizer=default_adamw(lr=1e-3, fused=False),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=2,
            global_batch_size=2 * size * accumulate,
            seq_len=LENGTH,
            steps=others.pop("steps", STEPS),
            max_norm=MAX_NORM,
            mixed_precision_param="float32",
            disable_cuda_graphs=others.pop("disable_cuda_graphs", True),
        ),
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor", data_parallel_shard_degree=size
        ),
        checkpoint=CheckpointManager.Config(**others.pop("checkpoint", {})),
        metrics=MetricsProcessor.Config(
            log_freq=1, enable_tensorboard=others.pop("is_tracked", True)
        ),
        debug=DebugConfig(seed=3),
        activation_checkpoint=None,
    )
    assert not others
    with patch("torchtitan.components.metrics.build_device_memory_monitor", Memory):
        return torchtitan.QSDPTrainer(config)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    [model] = trainer.model_parts
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}


def train(trainer: Any) -> None:
    with (
        patch("torchtitan.distributed.utils.set_pg_timeouts"),  # its barrier asks for a device
        patch("torchtitan.trainer.time.sleep"),
    ):
        trainer.train()
    trainer.close()


def zeros_of(weights: dict[str, Tensor]) -> float:
    """The share of zeros in the matrices of blocks."""
    values = [w.flatten() for n, w in weights.items() if n.startswith("layers.") and w.ndim == 2]
    return float((torch.cat(values) == 0).double().mean())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def tracked(folder: str, tag: str) -> list[float]:
    """What TensorBoard was given."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [path] = {str(each.parent) for each in Path(folder).rglob("events.out.tfevents.*")}
    events = EventAccumulator(path).Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [event.value for event in events.Scalars(tag)]


def _trained(kind: str, folder: str) -> dict[str, Any]:
    saves = {"enable": True, "interval": HALF}
    trainer = trainer_of(kind, folder, checkpoint=saves)
    train(trainer)
    weights, sent = weights_of(trainer), trainer.wire.handle.traffic.megabytes()["wire_sent_mb"]
    resumed = trainer_of(kind, folder, checkpoint={**saves, "load_step": HALF}, is_tracked=False)
    train(resumed)
    is_first = dist.get_rank() == 0
    return {
        "resumed": same(weights_of(resumed), weights),
        "steps": resumed.ntokens_seen == trainer.ntokens_seen == STEPS * 2 * LENGTH,
        "sent": sent,
        "zeros": zeros_of(weights),
        "groups": len({row.group for row in trainer.wire.handle.report().rows}),
        "tracked": [tracked(folder, tag) for tag in ("wire_sent_mb", "pruned")] if is_first else [],
        "losses": tracked(folder, "loss_metrics/global_avg_loss") if is_first else [],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_its_trainer_prunes_tracks_and_resumes_bit_for_bit(
    run: Run, tmp_path: Path, kind: str
) -> None:
    first, second = run(2, _trained, kind, str(tmp_path))
    for found in (first, second):
        assert found["resumed"]
        assert found["steps"]
        assert found["groups"] == 4
        assert found["zeros"] == pytest.approx(0.5 if kind == "acdc" else 0.0, abs=1e-3)
    sent, pruned = first["tracked"]
    assert first["losses"][STEPS - 1] < first["losses"][0] - 1
    assert sent[:STEPS] == sorted({*sent[:STEPS]})
    assert sent[STEPS - 1] == pytest.approx(first["sent"])
    steps = [after - before for before, after in pairwise(sent[:STEPS])]
    assert (min(steps) < 0.8 * max(steps)) == (kind == "acdc")
    assert {*pruned} == {"plain": set(), "acdc": {0.0, 0.5}, "cram": {0.5}}[kind]


def _by_hand(kind: str, folder: str) -> tuple[bool, int]:
    """Whether two micro-batches a step, clipped, come to what a loop of one's own does."""
    trainer = trainer_of(kind, folder, accumulate=2, steps=3)
    train(trainer)
    other = trainer_of(kind, folder, accumulate=2, steps=3)
    [model], [optimizer] = other.model_parts, other.optimizers.optimizers

    def run_all(step: int) -> None:
        for index in (2 * step, 2 * step + 1):
            inputs, labels = batch(index)
            logits = model(inputs["input"])
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
            )
            (loss / (2 * labels.numel() * dist.get_world_size())).backward()

    for step in range(3):
        run_all(step)
        if kind == "cram":
            with optimizer.second_pass():
                run_all(step)
        max_norm = MAX_NORM * (1 + (kind == "cram"))
        clip_grad_norm_(list(model.parameters()), max_norm, foreach=True)
        optimizer.step()
        other.lr_schedulers.step()
        optimizer.zero_grad()
    other.close()
    return same(weights_of(trainer), weights_of(other)), trainer.ntokens_seen


@pytest.mark.parametrize(
    "kind", [*KINDS[:1], pytest.param("acdc", marks=pytest.mark.heavy), "cram"]
)
def test_all_micro_batches_are_in_both_passes(run: Run, tmp_path: Path, kind: str) -> None:
    assert run(2, _by_hand, kind, str(tmp_path)) == [(True, 3 * 2 * 2 * LENGTH)] * 2


def _begun_from_a_seed(folder: str) -> bool:
    """Whether a training begins with the weights of a seed checkpoint, which has no wire."""
    saves = {"enable": True, "last_save_model_only": False}
    whole = trainer_of(
        "cram", folder, checkpoint={**saves, "create_seed_checkpoint": True}, is_tracked=False
    )
    whole.checkpointer.save(curr_step=0, last_step=True)
    whole.close()
    trainer = trainer_of("cram", folder, checkpoint=saves, is_tracked=False)
    trainer.checkpointer.load()
    trainer.close()
    return same(weights_of(trainer), dict(whole.model_parts[0].named_parameters()))


def _beginnings(folder: str) -> list[Any]:
    found: list[Any] = [_begun_from_a_seed(folder)]
    for options in (
        {"disable_cuda_graphs": False},
        {"spec": model_registry("debugmodel")},
        {"method": "cram"},
        {"method": lambda *_: None},
    ):
        try:
            if "method" in options:
                made: Any = options.pop("method")
                spec = model_registry("debugmodel")
                options["spec"] = torchtitan.wrap_spec(spec, qsdp.QSDPConfig(), made)
            trainer_of("plain", folder, is_tracked=False, **options)
        except ValueError as error:
            found.append(str(error))
    return found


def test_seeds_begin_a_training_and_what_would_go_wrong_is_refused(
    run: Run, tmp_path: Path
) -> None:
    for is_begun, graphs, spec, *methods in run(2, _beginnings, str(tmp_path)):
        assert is_begun
        assert methods == [
            "method is a str: give a function that makes it.",
            "method has made None: return CrAM, ACDC, GMP or SAM.",
        ]
        assert graphs.startswith("training.disable_cuda_graphs is False")
        assert spec == "the model_spec has no wire: give that of wrap_spec(spec, wire)."
