"""Lightning: Fabric and Trainer train under the wire, prune what they say, and resume bit for bit.

``ModelParallelStrategy`` runs on CPUs. Lightning finds the processes that the pool has started by
``Ranks``, its own way of asking for them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import qsdp
from tests_distributed.support.running import Run

pytest.importorskip("lightning", reason="Lightning is not installed: make test-integrations")

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy as TrainerStrategy
from torchmetrics import MeanMetric

from qsdp.integrations import lightning

WIDTH, VOCAB, LENGTH = 32, 96, 16
STEPS = 30
HALF = STEPS // 2
KINDS = [pytest.param("plain", marks=pytest.mark.heavy), "acdc", "cram"]
PRELOADED = ["lightning.pytorch", "lightning.fabric"]
WIRE = qsdp.QSDPConfig(bucket_size=64)


DRAWS: list[tuple[bool, float]] = []
"""Of random numbers in training steps; whether in a second pass."""


class Ranks(ClusterEnvironment):
    """The process group that there is."""

    creates_processes_externally = True
    main_address, main_port = "localhost", 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        assert size == dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        assert rank == dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.down(torch.relu(self.up(x))))
        return y


class Model(nn.Module):
    """Says which token follows: small, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


def shard(model: Any, mesh: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def batch(index: int) -> dict[str, Tensor]:
    """One rank's micro-batch."""
    generator = torch.Generator().manual_seed(97 * index + dist.get_rank())
    start = torch.randint(VOCAB, (4, 1), generator=generator)
    return {"tokens": (start * 7 + torch.arange(LENGTH)) % VOCAB}


def method_of(kind: str, model: nn.Module, base: torch.optim.Optimizer) -> Any:
    if kind == "cram":
        return qsdp.CrAM(model, base, sparsity=0.5)
    if kind == "acdc":
        return qsdp.ACDC(model, base, schedule=STEPS, target=0.5)
    return base


def weights_of(model: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("core."): p.detach().full_tensor().clone()
        for name, p in model.named_parameters()
    }


def zeros_of(weights: dict[str, Tensor]) -> float:
    """The share of zeros in the matrices of blocks."""
    values = torch.cat([w.flatten() for n, w in weights.items() if "blocks" in n and w.ndim == 2])
    return float((values == 0).double().mean())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def mesh_of_ranks() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))


def by_hand(
    kind: str,
    *,
    steps: int = STEPS,
    accumulate: int = 1,
    clip: float | None = None,
    is_synchronized_once: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    """What a loop of one's own comes to: the weights, and the losses of first passes."""
    model: Any = shard(Model(), mesh_of_ranks())
    handle = qsdp.install(model, WIRE)
    optimizer = method_of(kind, model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    if kind != "plain":
        optimizer.share_support(handle.set_support)
    losses: list[float] = []

    def run_all(step: int) -> list[float]:
        found = []
        for place in range(accumulate):
            index = step * accumulate + place
            torch.manual_seed(index)  # dropout
            is_last = place == accumulate - 1
            model.set_requires_gradient_sync(is_last or not is_synchronized_once)
            loss = model(batch(index)["tokens"])
            (loss / accumulate).backward()
            found.append(float(loss.detach()))
        return found

    for step in range(steps):
        losses += run_all(step)
        if kind == "cram":
            with optimizer.second_pass():
                run_all(step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip * (1 + (kind == "cram")))
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), losses


class Module(LightningModule):
    """The model for Trainer, with a metric, a log, and a step that takes entries out."""

    def __init__(self, kind: str, callback: Any) -> None:
        super().__init__()
        self.kind, self.callback = kind, callback
        self.core = Model()
        self.mean = MeanMetric(sync_on_compute=False)
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if not isinstance(self.core, FSDPModule):
            shard(self.core, self.device_mesh)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.core(batch.pop("tokens"))
        self.mean.update(loss.detach())
        self.log("loss", loss.detach(), on_step=True, on_epoch=True, batch_size=1)
        DRAWS.append((self.callback.is_second_pass, random.random()))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        self.optimizer = method_of(self.kind, self, torch.optim.AdamW(self.parameters(), lr=3e-3))
        return self.optimizer


class Batches:
    """Batches that go on where a checkpoint was written."""

    def __init__(self, count: int) -> None:
        self.count, self.at = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        while self.at < self.count:
            self.at += 1
            yield batch(self.at - 1)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Kept(Logger):
    """A logger that keeps what it is given."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)

    def log_hyperparams(self, params: Any, *args: Any) -> None: ...


class Seeds(Callback):
    """Dropout of each micro-batch as it is by hand; and a checkpoint after a step."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        torch.manual_seed(index)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.path is not None and trainer.global_step == HALF:
            trainer.save_checkpoint(self.path)


def trainer_of(callbacks: list[Callback], **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=TrainerStrategy(dist.get_world_size(), 1),
        plugins=[Ranks()],
        max_epochs=1,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )


def fit(
    kind: str,
    *,
    steps: int = STEPS,
    accumulate: int = 1,
    clip: float | None = None,
    path: str | None = None,
    resume: str | None = None,
) -> tuple[Module, Kept]:
    random.seed(5)
    callback, logger = lightning.QSDPCallback(WIRE), Kept()
    trainer = trainer_of(
        [Seeds(path), callback],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        logger=logger,
        log_every_n_steps=1,
    )
    module = Module(kind, callback)
    trainer.fit(module, Batches(steps * accumulate), ckpt_path=resume)
    return module, logger


def _trained_by_trainer(kind: str, folder: str) -> dict[str, Any]:
    path = f"{folder}/{kind}.ckpt"
    module, logger = fit(kind, path=path)
    weights, losses = by_hand(kind)
    resumed, _ = fit(kind, resume=path)
    return {
        "as by hand": same(weights_of(module), weights),
        "losses": module.losses == losses,
        "resumed": same(weights_of(resumed), weights_of(module)),
        "resumed steps": len(resumed.losses),
        "fall": losses[-1] < losses[0] - 1,
        "zeros": zeros_of(weights_of(module)),
        "sent": [row["wire_sent_mb"] for row in logger.rows if "wire_sent_mb" in row],
        "counted": sum(
            count
            for name, count in module.callback.handle.traffic.snapshot().items()
            if name in ("gather_sent_bytes", "reduce_sent_bytes")
        ),
        "pruned": {row.get("pruned") for row in logger.rows if "wire_sent_mb" in row},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_does_what_a_loop_does_and_resumes_bit_for_bit(
    run: Run, tmp_path: Path, kind: str
) -> None:
    for found in run(2, _trained_by_trainer, kind, str(tmp_path)):
        assert found["as by hand"]
        assert found["losses"]
        assert found["fall"]
        assert found["resumed"]
        assert found["resumed steps"] == STEPS - HALF
        assert len(found["sent"]) == STEPS
        assert found["sent"] == sorted({*found["sent"]})
        assert found["sent"][-1] == pytest.approx(found["counted"] / 1e6)
        assert found["pruned"] == {"plain": {None}, "cram": {0.5}, "acdc": {0.0, 0.5}}[kind]
        assert found["zeros"] == pytest.approx(0.5 if kind == "acdc" else 0.0, abs=1e-3)


def draws_by_pass() -> dict[bool, list[float]]:
    return {again: [drawn for was, drawn in DRAWS if was == again] for again in (False, True)}


def _accumulated(clip: float) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 3, "accumulate": 2, "clip": clip}
    DRAWS.clear()
    module, logger = fit("cram", **options)
    weights, losses = by_hand("cram", **options)
    draws = draws_by_pass()
    random.seed(5)
    return {
        "as by hand": same(weights_of(module), weights),
        "first losses": module.losses == losses,
        "draws": draws,
        "without a second pass": [random.random() for _ in range(6)],
        "mean": float(module.mean.compute()) - sum(losses) / len(losses),
        "logged": [row["loss_step"] for row in logger.rows if "loss_step" in row],
        "of the epoch": [row["loss_epoch"] for row in logger.rows if "loss_epoch" in row],
        "losses": losses,
        "steps": (module.optimizer.num_steps, module.trainer.global_step),
    }


def test_all_micro_batches_are_in_both_passes_and_nothing_else_is(run: Run) -> None:
    clip = 0.05
    for found in run(2, _accumulated, clip):
        assert found["as by hand"]
        assert found["first losses"]
        assert found["draws"][True] == found["draws"][False] == found["without a second pass"]
        assert abs(found["mean"]) < 1e-6
        assert found["logged"] == pytest.approx(found["losses"][1::2])
        assert found["of the epoch"] == pytest.approx([sum(found["losses"]) / 6])
        assert found["steps"] == (3, 3)


class Changes(Callback):
    """Changes a batch where it begins, and draws random numbers."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        batch["tokens"] += int(torch.randint(2, ()))


class Seen(Module):
    """Notes what its steps are given and draw; ``ends`` gives what they return."""

    def __init__(self, callback: Any, ends: Any = None) -> None:
        super().__init__("cram", callback)
        self.ends = ends or (lambda index, loss: loss)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        Changes().on_train_batch_start(None, None, batch, index)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        drawn = batch["tokens"].sum().item() + torch.rand(()).item()
        DRAWS.append((self.callback.is_second_pass, drawn))
        return self.ends(index, self.core(batch["tokens"] % VOCAB))


class ByHand(Seen):
    """Takes no step at all."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return []


def _zeros_of_fits() -> list[float]:
    """The zeros after fits of one module: AC/DC prunes in its third step, and is dense before."""
    callback = lightning.QSDPCallback(WIRE)
    module, found = Module("acdc", callback), []
    for kind, steps in (("acdc", 3), ("plain", 1), ("acdc", 3), ("acdc", 1)):
        module.kind = kind
        trainer_of([callback]).fit(module, Batches(steps))
        found.append(zeros_of(weights_of(module)))
    return found


def _beginnings() -> list[Any]:
    callback = lightning.QSDPCallback(WIRE)
    trainer = trainer_of([callback, Changes()], accumulate_grad_batches=2)

    def interrupted(index: int, loss: Tensor) -> Tensor:
        if index == 3:
            module.ends = lambda _, loss: loss
            raise InterruptedError
        return loss

    module = Seen(callback, interrupted)
    with pytest.raises(InterruptedError):
        trainer.fit(module, Batches(6))
    DRAWS.clear()
    trainer.fit(module, Batches(6))
    draws, handle = draws_by_pass(), callback.handle
    handle.remove()
    trainer.fit(module, Batches(2))
    trainer_of([callback]).fit(ByHand(callback), Batches(2))
    with pytest.raises(ValueError, match="has no loss for a second pass: return one"):
        trainer_of([callback]).fit(Seen(callback, lambda *_: {"loss": None}), Batches(2))
    return [draws[True] == draws[False], len(draws[True]), callback.handle is handle]


def test_both_passes_and_each_fit_begin_alike(run: Run) -> None:
    assert run(2, _beginnings) == [[True, 6, False]] * 2
    for first, plain, second, dense in run(2, _zeros_of_fits):
        assert first == second == pytest.approx(0.5, abs=1e-3)
        assert plain == dense == pytest.approx(0.0, abs=1e-3)


def by_fabric(
    kind: str,
    *,
    is_made_before: bool = True,
    steps: int = STEPS,
    accumulate: int = 1,
    clip: float | None = None,
    path: str | None = None,
    resume: str | None = None,
) -> dict[str, Tensor]:
    parallelize = lightning.wrap_parallelize(shard, WIRE)
    size = dist.get_world_size()
    strategy = ModelParallelStrategy(parallelize, size, 1)
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy, plugins=[Ranks()])
    fabric.launch()
    model = fabric.setup_module(Model())
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if is_made_before:
        optimizer: Any = fabric.setup_optimizers(method_of(kind, model, base))
    else:
        optimizer = method_of(kind, model, fabric.setup_optimizers(base))
    if kind != "plain":
        optimizer.share_support(parallelize.handle.set_support)
    state = {"model": model, "optimizer": optimizer}
    if resume is not None:
        parallelize.load_state_dict(fabric.load(resume, state)["wire"])

    def run_all(step: int) -> None:
        for place in range(accumulate):
            index = step * accumulate + place
            torch.manual_seed(index)
            with fabric.no_backward_sync(model, enabled=place < accumulate - 1):
                fabric.backward(model(batch(index)["tokens"]) / accumulate)

    for step in range(0 if resume is None else HALF, steps):
        run_all(step)
        if kind == "cram":
            with optimizer.second_pass():
                run_all(step)
        if clip is not None:
            fabric.clip_gradients(model, optimizer, max_norm=clip * (1 + (kind == "cram")))
        optimizer.step()
        optimizer.zero_grad()
        if path is not None and step == HALF - 1:
            fabric.save(path, {**state, "wire": parallelize})
    return weights_of(model.module)


def _trained_by_fabric(kind: str, folder: str) -> dict[str, Any]:
    path = f"{folder}/{kind}"
    weights = by_fabric(kind, path=path)
    return {
        "as by hand": same(weights, by_hand(kind)[0]),
        "resumed": same(weights, by_fabric(kind, is_made_before=False, resume=path)),
        "zeros": zeros_of(weights),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_fabric_does_what_a_loop_does_and_resumes_bit_for_bit(
    run: Run, tmp_path: Path, kind: str
) -> None:
    for found in run(2, _trained_by_fabric, kind, str(tmp_path)):
        assert found["as by hand"]
        assert found["resumed"]
        assert found["zeros"] == pytest.approx(0.5 if kind == "acdc" else 0.0, abs=1e-3)


def _accumulated_by_fabric() -> list[bool]:
    options: dict[str, Any] = {"steps": 3, "accumulate": 2, "clip": 0.05}
    weights, _ = by_hand("cram", is_synchronized_once=True, **options)
    return [
        same(by_fabric("cram", is_made_before=is_before, **options), weights)
        for is_before in (True, False)
    ]


def test_fabric_accumulates_and_clips_before_or_after_it_wraps_the_optimizer(run: Run) -> None:
    assert run(2, _accumulated_by_fabric) == [[True, True]] * 2
