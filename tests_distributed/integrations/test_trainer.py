"""transformers' Trainer with the wire and with methods, as qsdp.integrations.transformers has it.

Numbers are compared with loops written here, in one process or with the whole model on every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qsdp
from tests_distributed.support.accelerate_on_cpus import fsdp2_on_cpus
from tests_distributed.support.running import Run
from tests_distributed.support.trainer_toy import Tokens, arguments, tiny_llama, whole_weights

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
PRELOADED = [
    "qsdp.integrations.transformers",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.checkpoint.state_dict",
]
WIRE = {"bucket_size": 64}
FULL = {"weight_bits": 32, "grad_bits": 32}
Method = Callable[[Any, Any, int], Any]


def _cram(model: Any, base: Any, steps: int) -> Any:
    return qsdp.CrAM(model, base, sparsity=0.5)


def _acdc(model: Any, base: Any, steps: int) -> Any:
    return qsdp.ACDC(model, base, schedule=steps, target=0.5)


@contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    with warnings.catch_warnings(), fsdp2_on_cpus():
        warnings.simplefilter("ignore")
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def _trainer(
    folder: Path,
    method: Method | None = None,
    *,
    kind: Any = None,
    wire: dict[str, Any] | None = None,
    model: Any = None,
    data: Any = None,
    **options: Any,
) -> Any:
    from transformers import PrinterCallback

    from qsdp.integrations.transformers import QSDPTrainer

    made = (kind or QSDPTrainer)(
        model=tiny_llama() if model is None else model,
        args=arguments(str(folder), **options),
        train_dataset=Tokens(64) if data is None else data,
        eval_dataset=Tokens(8),
        wire=qsdp.QSDPConfig(**(WIRE if wire is None else wire)),
        method=method,
    )
    made.remove_callback(PrinterCallback)
    return made


def _of(trainer: Any, key: str) -> list[Any]:
    return [line[key] for line in trainer.state.log_history if key in line]


def _counting() -> Any:
    """A trainer that counts what it computes, spoils its inputs and notes what it was given."""
    from qsdp.integrations.transformers import QSDPTrainer

    class Counting(QSDPTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seen = _Seen()
            self.num_losses, self.total = 0, torch.zeros(())
            self.losses: dict[str, list[float]] = {"train": []}
            super().__init__(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            given = {name: value.clone() for name, value in inputs.items()}
            self.seen.batches.append((given, torch.get_rng_state()))
            loss = super().compute_loss(model, dict(given), *args, **kwargs)
            inputs.pop("labels")
            inputs["input_ids"].zero_()
            self.num_losses += 1
            self.total += 1
            self.losses["train"].append(loss.item())
            return loss

    return Counting


class _Seen:
    """What all passes have computed: an object of its own keeps what the second pass does."""

    def __init__(self) -> None:
        self.batches: list[tuple[dict[str, Tensor], Tensor]] = []


def _prunable(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]


def _cram_by_hand(
    batches: list[list[tuple[dict[str, Tensor], Tensor]]], rho: float, max_norm: float, rate: float
) -> tuple[dict[str, Tensor], list[float]]:
    """CrAM+ over SGD, with the whole model on each rank: the weights, and norms before clipping."""
    model = tiny_llama(attention_dropout=0.3)
    parameters = list(model.parameters())

    def gradient(step: list[tuple[dict[str, Tensor], Tensor]]) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in parameters]
        for inputs, state in step:
            torch.set_rng_state(state)
            for total, part in zip(
                sums, torch.autograd.grad(model(**inputs).loss, parameters), strict=True
            ):
                total += part / len(step)
        for total in sums:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return sums

    norms = []
    for step in batches:
        first = gradient(step)
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            for p, g in zip(parameters, first, strict=True):
                p += rho * g
            pruned = _prunable(model)
            magnitudes = torch.cat([p.abs().flatten() for p in pruned])
            threshold = magnitudes.kthvalue(len(magnitudes) // 2).values
            masks = {id(p): p.abs() > threshold for p in pruned}
            for p in pruned:
                p *= masks[id(p)]
        second = gradient(step)
        with torch.no_grad():
            both = [
                g + h * masks.get(id(p), torch.ones(()))
                for p, g, h in zip(parameters, first, second, strict=True)
            ]
            norms.append(float(torch.linalg.vector_norm(torch.stack([b.norm() for b in both]))))
            for p, old, grad in zip(parameters, before, both, strict=True):
                p.copy_(old - rate * min(1.0, 2 * max_norm / (norms[-1] + 1e-6)) * grad)
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def _steps_of(seen: list[Any], sizes: list[int]) -> tuple[list[list[Any]], list[list[Any]]]:
    """What was computed in the first passes of the steps and in the second ones."""
    first, second, at = [], [], 0
    for size in sizes:
        first.append(seen[at : at + size])
        second.append(seen[at + size : at + 2 * size])
        at += 2 * size
    assert at == len(seen)
    return first, second


def _cram_with_accumulation(folder: Path, num: int, sizes: list[int]) -> dict[str, Any]:
    rho, max_norm, rate = 0.05, 0.4, 0.2
    with _quiet():
        trainer = _trainer(
            folder,
            lambda model, base, steps: qsdp.CrAM(model, base, sparsity=0.5, rho=rho),
            kind=_counting(),
            wire=FULL,
            model=tiny_llama(attention_dropout=0.3),
            data=Tokens(20),
            gradient_accumulation_steps=num,
            max_steps=len(sizes),
            optim="sgd",
            learning_rate=rate,
            max_grad_norm=max_norm,
            include_num_input_tokens_seen="all",
        )
        trainer.train()
        first, second = _steps_of(trainer.seen.batches, sizes)
        for one, other in zip(sum(first, []), sum(second, []), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        weights, norms = _cram_by_hand(first, rho, max_norm, rate)
        torch.testing.assert_close(whole_weights(trainer.model), weights, rtol=2e-4, atol=2e-5)
        assert _of(trainer, "grad_norm") == pytest.approx(norms, rel=1e-3)
        assert min(norms) > 2 * max_norm  # what is clipped
        counted = [trainer.num_losses, int(trainer.total), len(trainer.losses["train"])]
        assert counted == [sum(sizes)] * 3
        assert trainer.state.num_input_tokens_seen == sum(sizes) * 2 * 16 * 2
        assert trainer._made.num_steps == len(sizes)
        assert trainer.args.max_grad_norm == max_norm
        return {key: _of(trainer, key)[-1] for key in ("pruned", "skipped_steps")}


def test_cram_takes_every_micro_batch_into_both_passes_and_counts_it_once(
    run: Run, tmp_path: Path
) -> None:
    # 20 sequences are 5 micro-batches a rank and epoch: of 2 at a time, the last step has one.
    for num, sizes in ((1, [1, 1]), (2, [2, 2, 1, 2])):
        folder = tmp_path / str(num)
        for logged in run(2, _cram_with_accumulation, folder, num, sizes):
            assert logged == {"pruned": 0.5, "skipped_steps": 0}


def _resumed(folder: Path, method: Method | None, wire: dict[str, Any]) -> tuple[Any, Any]:
    """A training, and one that goes on from its middle."""
    options = {"save_strategy": "steps", "save_steps": 3, "wire": WIRE | wire}
    whole = _trainer(folder, method, **options)
    whole.train()
    later = _trainer(folder, method, **options)
    later.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return whole, later


def _resume(folder: Path, method: Method | None, wire: dict[str, Any]) -> None:
    with _quiet():
        whole, later = _resumed(folder, method, wire)
        weights = whole_weights(whole.model)
        torch.testing.assert_close(whole_weights(later.model), weights, rtol=0, atol=0)
        assert _of(later, "grad_norm")[-3:] == _of(whole, "grad_norm")[-3:]
        assert _of(later, "loss")[:3] == _of(whole, "loss")[:3]  # kept with the checkpoint


@pytest.mark.parametrize(
    ("method", "wire"),
    [
        (None, {"levels": "learned", "weight_bits": 4, "grad_bits": 4}),
        (_acdc, {}),
        (_cram, {"gather": "delta"}),
        pytest.param(None, {}, marks=pytest.mark.heavy),
        pytest.param(_cram, {}, marks=pytest.mark.heavy),
        pytest.param(None, {"gather": "delta"}, marks=pytest.mark.heavy),
    ],
)
def test_a_training_goes_on_from_its_middle_bit_for_bit(
    run: Run, tmp_path: Path, method: Method | None, wire: dict[str, Any]
) -> None:
    run(2, _resume, tmp_path, method, wire)
