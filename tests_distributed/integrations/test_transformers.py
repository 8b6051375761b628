"""transformers' Trainer with the wire and with methods, as qsdp.integrations.transformers has it.

Numbers are compared with loops written here, in one process or with the whole model on every rank.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import qsdp
from qsdp.compat.parameter_group import groups_have_pending_gradients
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
def quiet() -> Iterator[None]:
    """Inside, Accelerate shards on CPUs, and the libraries warn of nothing."""
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
            self.seen.sizes.append(self.current_gradient_accumulation_steps)
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
        self.sizes: list[int] = []
        """How many micro-batches ``Trainer`` said there were."""


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
    with quiet():
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
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        weights, norms = _cram_by_hand(first, rho, max_norm, rate)
        torch.testing.assert_close(whole_weights(trainer.model), weights, rtol=2e-4, atol=2e-5)
        assert _of(trainer, "grad_norm") == pytest.approx(norms, rel=1e-3)
        assert min(norms) > 2 * max_norm  # what is clipped
        counted = [trainer.num_losses, int(trainer.total), len(trainer.losses["train"])]
        assert counted == [sum(sizes)] * 3
        assert trainer.state.num_input_tokens_seen == sum(sizes) * 2 * 16 * 2
        assert trainer._made.num_steps == len(sizes)
        assert trainer.args.max_grad_norm == max_norm
        logged = {key: _of(trainer, key)[-1] for key in ("pruned", "skipped_steps")}
        sent = trainer.handle.traffic.snapshot()["reduce_sent_bytes"]
        return logged | {"reduced": sent / len(sizes)}


class _Stream(IterableDataset[Any]):
    """A data set that does not say how long it is."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Tokens(12))


def _cram_over_the_end_of_a_stream(folder: Path) -> list[int]:
    with quiet():
        trainer = _trainer(
            folder,
            _cram,
            kind=_counting(),
            data=_Stream(),
            gradient_accumulation_steps=2,
            max_steps=2,
        )
        trainer.train()
        first, second = _steps_of(trainer.seen.batches, [2, 3])
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        return trainer.seen.sizes


def test_cram_keeps_micro_batches_that_wait_for_a_later_step(run: Run, tmp_path: Path) -> None:
    # Of 3 micro-batches a rank the last one waits for those of the next epoch.
    for sizes in run(2, _cram_over_the_end_of_a_stream, tmp_path):
        assert sizes == [2, 2] * 2 + [1, 2, 2] * 2


def test_cram_takes_every_micro_batch_into_both_passes_and_counts_it_once(
    run: Run, tmp_path: Path
) -> None:
    # 20 sequences are 5 micro-batches a rank and epoch: of 2 at a time, the last step has one.
    reduced = []
    for num, sizes in ((1, [1, 1]), (2, [2, 2, 1, 2])):
        logged = run(2, _cram_with_accumulation, tmp_path / str(num), num, sizes)[0]
        reduced.append(logged.pop("reduced"))
        assert logged == {"pruned": 0.5, "skipped_steps": 0}
    assert reduced[1] == pytest.approx(
        reduced[0], rel=0.01
    )  # a step sends the same gradients, however many micro-batches


def _resumed(folder: Path, method: Method | None, wire: dict[str, Any]) -> tuple[Any, Any]:
    """A training, and one that goes on from its middle."""
    options = {"save_strategy": "steps", "save_steps": 3, "wire": WIRE | wire}
    whole = _trainer(folder, method, **options)
    whole.train()
    later = _trainer(folder, method, **options)
    later.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return whole, later


def _resume(folder: Path, method: Method | None, wire: dict[str, Any]) -> None:
    with quiet():
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


def _long(folder: Path) -> dict[str, Any]:
    """AC/DC for 30 steps, in which every tracker hears of the wire."""
    from transformers import TrainerCallback

    class Tracker(TrainerCallback):
        heard: list[dict[str, Any]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.heard.append(dict(logs))

    with quiet():
        trainer = _trainer(folder, _acdc, max_steps=30, logging_steps=10)
        trainer.add_callback(tracker := Tracker())
        trainer.train()
        weights = torch.cat([p.flatten() for p in _prunable(_whole(trainer.model))])
        sent = trainer.handle.traffic.snapshot()
        evaluated = trainer.evaluate()
        after = trainer.handle.traffic.snapshot()
    assert {key: after[key] for key in sent if "other" not in key} == {
        key: sent[key] for key in sent if "other" not in key
    }
    assert after["other_sent_bytes"] > sent["other_sent_bytes"]
    return {
        "zeros": float((weights == 0).float().mean()),
        "losses": [line["loss"] for line in tracker.heard if "loss" in line],
        "sent": [line["wire_sent_mb"] for line in tracker.heard if "loss" in line],
        "in all": (sent["gather_sent_bytes"] + sent["reduce_sent_bytes"]) / 1e6,
        "pruned": [line["pruned"] for line in tracker.heard if "loss" in line],
        "evaluated": {*evaluated} & {"wire_sent_mb", "pruned"},
    }


def _whole(model: Any) -> Any:
    plain = tiny_llama()
    plain.load_state_dict(whole_weights(model))
    return plain


def test_acdc_prunes_and_every_tracker_hears_of_it_and_of_bytes(run: Run, tmp_path: Path) -> None:
    for told in run(2, _long, tmp_path):
        assert told["zeros"] == pytest.approx(0.5, abs=1e-3)
        assert told["losses"][-1] < told["losses"][0] - 0.3
        assert 0 < told["sent"][0] < told["sent"][1] < told["sent"][2] == told["in all"]
        assert told["pruned"][-1] == pytest.approx(0.5, abs=1e-3)
        assert told["sent"][2] - told["sent"][1] < 0.97 * told["sent"][0], told["sent"]
        # A hyperparameter search takes the sum of what evaluate() returns.
        assert told["evaluated"] == set()


def _scaled(folder: Path) -> None:
    """Gradients of both passes are unscaled and clipped once; infinite ones are skipped."""
    from qsdp.integrations.transformers import QSDPTrainer

    calls = itertools.count(1)

    class Overflowing(QSDPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            factor = float("inf") if next(calls) in (3, 6) else 1.0  # of steps 2 and 3
            return super().compute_loss(*args, **kwargs) * factor

    def trained(method: Method, kind: Any, *, is_scaled: bool) -> Any:
        trainer = _trainer(folder, method, kind=kind, wire=FULL, optim="sgd", learning_rate=0.1)
        if is_scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            trainer.accelerator.unscale_gradients = lambda: trainer.accelerator.scaler.unscale_(
                trainer.optimizer.optimizer
            )
        trainer.train()
        return trainer

    with quiet():
        for method in (_cram, _acdc):
            plain, scaled = (trained(method, None, is_scaled=each) for each in (False, True))
            close = {"rtol": 1e-5, "atol": 1e-6}
            expected = whole_weights(plain.model)
            torch.testing.assert_close(whole_weights(scaled.model), expected, **close)
            norms = pytest.approx(_of(plain, "grad_norm"), rel=1e-4)
            assert _of(scaled, "grad_norm") == norms
            assert scaled._made.num_steps == plain._made.num_steps == 6
        skipping = trained(_cram, Overflowing, is_scaled=True)
        assert _of(skipping, "skipped_steps")[:4] == [0, 1, 2, 2], _of(skipping, "skipped_steps")
        assert skipping.accelerator.scaler.get_scale() == 256.0


def test_gradients_that_a_grad_scaler_scales_are_those_of_both_passes(
    run: Run, tmp_path: Path
) -> None:
    run(2, _scaled, tmp_path)


def _again(folder: Path) -> None:
    """train() once more, with the model of before or another, and after a lack of memory."""
    from qsdp.integrations.transformers import QSDPTrainer

    calls = itertools.count(1)

    class Short(QSDPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == 4:  # the second pass of the second step
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(*args, **kwargs)

    with quiet():
        trainer = _trainer(folder, _acdc)
        trainer.train()
        first, made = trainer.handle, trainer._made
        trainer.train()
        assert trainer.handle is first
        assert trainer._made is not made
        assert trainer._made.num_steps == made.num_steps == 6

        short = _trainer(folder, _cram, kind=Short, auto_find_batch_size=True)
        short.train()
        assert short._train_batch_size == 1
        assert short._made.num_steps == 6

        trainer.model_init = lambda: tiny_llama()  # its arguments are counted
        losses = []
        for _ in range(2):
            trainer.train()
            assert trainer.handle is not first
            first = trainer.handle
            losses.append(_of(trainer, "loss"))
        assert losses[0] == losses[1]


def test_training_again_goes_over_one_wire_and_begins_a_method_anew(
    run: Run, tmp_path: Path
) -> None:
    run(2, _again, tmp_path)


def _given_up(folder: Path) -> None:
    """A callback stops a training between micro-batches, and a subclass goes on after an error."""
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    counting = _counting()
    had_some: list[bool] = []

    class Lenient(counting):  # type: ignore[misc]
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().training_step(model, *args, **kwargs)
            except KeyError:
                self.seen.batches.clear()
                return torch.zeros(())

        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            had_some.append(groups_have_pending_gradients(model))
            loss = super().compute_loss(model, *args, **kwargs)
            if len(self.seen.sizes) == 2:
                raise KeyError("spoilt")
            return loss

    options: dict[str, Any] = {"wire": FULL, "gradient_accumulation_steps": 2, "max_steps": 1}
    with quiet():
        plain, stopped = (_trainer(folder, _cram, **options) for _ in range(2))
        plain.train()
        stopped.add_callback(Stopping)
        stopped.train()
        stopped.remove_callback(Stopping)
        stopped.train()
        lenient = _trainer(
            folder, _cram, kind=Lenient, **options | {"gradient_accumulation_steps": 3}
        )
        lenient.train()
        (first, _), (second, _) = lenient.seen.batches
        assert had_some == [False, True, False, False]
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        expected = whole_weights(plain.model)
        torch.testing.assert_close(whole_weights(stopped.model), expected, rtol=0, atol=0)


def test_a_step_that_was_given_up_leaves_nothing_to_the_next(run: Run, tmp_path: Path) -> None:
    run(2, _given_up, tmp_path)


def _exact(folder: Path) -> None:
    with quiet():
        trainer = _trainer(folder, wire={"weight_bits": 3, "bucket_size": 64})
        trainer.train()
        by_hand = _whole(trainer.model).eval()
        with torch.no_grad():
            batch = torch.stack([Tokens(8)[i]["input_ids"] for i in range(8)])
            expected = float(by_hand(input_ids=batch, labels=batch).loss)
        quantized = trainer.evaluate()["eval_loss"]
        trainer.exact_evaluation = True
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
        assert abs(quantized - expected) > 1e-4


def test_evaluation_may_be_of_exact_weights(run: Run, tmp_path: Path) -> None:
    run(2, _exact, tmp_path)


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return "not refused"


def _refusals(folder: Path) -> dict[str, str]:
    from transformers import Trainer

    from qsdp.integrations.transformers import QSDPMixin, QSDPTrainer

    found = {}
    with quiet():
        found["unsharded"] = _message(_trainer(folder, fsdp=None).train)
        found["no function"] = _message(lambda: _trainer(folder, "cram"))  # type: ignore[arg-type]
        found["nothing made"] = _message(_trainer(folder, lambda *_: None).train)
        clipping = _trainer(folder, lambda m, base, _: qsdp.CrAM(m, base, max_norm=1.0))
        found["clipped twice"] = _message(clipping.train)
        clipping.args.max_grad_norm = 0.0
        clipping.train()
        cuts = SimpleNamespace(cp_enabled=True)
        cutting = mock.patch("accelerate.Accelerator.parallelism_config", cuts, create=True)
        late = _trainer(folder, lambda *made: (cutting.start(), _cram(*made))[1])
        found["cut sequences"] = _message(late.train)
        cutting.stop()
        own = {"_prepare_inputs": Trainer._prepare_inputs}
        found["own inputs"] = _message(
            _trainer(folder, _cram, kind=type("Own", (QSDPTrainer,), own)).train
        )
        found["order"] = _message(lambda: type("Mine", (Trainer, QSDPMixin), {}))

        saving = _trainer(folder, save_strategy="steps", save_steps=3)
        saving.train()
        path = folder / "checkpoint-3" / "qsdp_wire.bin"
        raw = bytearray(path.read_bytes())

        def damage(content: bytes | None) -> None:
            dist.barrier()
            if dist.get_rank() == 0:
                path.unlink() if content is None else path.write_bytes(content)
            dist.barrier()

        def resume() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", ".*the state of the wire")
                _trainer(folder).train(resume_from_checkpoint=str(path.parent))

        raw[len(raw) // 2] ^= 1
        damage(bytes(raw))
        found["damaged"] = _message(resume)
        damage(None)
        try:
            resume()
        except UserWarning as warning:
            found["missing"] = str(warning)
    return found


def test_what_cannot_be_trained_or_resumed_is_said_in_one_sentence(
    run: Run, tmp_path: Path
) -> None:
    words = {
        "unsharded": r"LlamaForCausalLM is not sharded by FSDP2: set fsdp=True",
        "no function": r"^method is a str: give a function",
        "nothing made": r"^method has made None: return CrAM, ",
        "clipped twice": r"^CrAM clips at its max_norm, and Trainer at max_grad_norm 1.0: leave",
        "cut sequences": r"^CrAM is given beside context or sequence parallelism, .*: leave out",
        "own inputs": r"^inputs of a second pass .*: call super\(\)\._prepare_inputs\(inputs\) in",
        "order": r"^Mine has QSDPMixin after its trainer: name it first\.$",
        "damaged": r"qsdp_wire.bin is damaged: restore it, or",
        "missing": r"qsdp_wire.bin is missing, the state of the wire, which begins anew: restore",
    }
    for found in run(2, _refusals, tmp_path):
        assert found.keys() == words.keys()
        for kind, pattern in words.items():
            assert re.search(pattern, found[kind]), (kind, found[kind])
