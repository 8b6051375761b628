"""Accelerate with qsdp: the numbers of a loop by hand, and resumes bit for bit."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qsdp
from tests_distributed.support import leftovers
from tests_distributed.support.accelerate_on_cpus import fsdp2_on_cpus
from tests_distributed.support.running import Run

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

PRELOADED = ["accelerate", "transformers.models.llama.modeling_llama"]
VOCAB, CONTEXT, STEPS = 96, 16, 8
SPARSITY = 0.7
ON_CPUS = {"ACCELERATE_USE_CPU": "true"}
WIRE: dict[str, Any] = {"bucket_size": 64}
METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "plain": lambda model, base: base,
    "cram": lambda model, base: qsdp.CrAM(model, base, sparsity=SPARSITY, max_norm=1.0),
    "acdc": lambda model, base: qsdp.ACDC(model, base, schedule=STEPS, target=SPARSITY),
    "gmp": lambda model, base: qsdp.GMP(model, base, schedule=qsdp.GMPSchedule.of(STEPS, 0.6)),
    "unclipped": lambda model, base: qsdp.CrAM(model, base, sparsity=SPARSITY),
    "dropout": lambda model, base: qsdp.CrAM(model, base, sparsity=0.0, rho=0.0),
}


def _model(**settings: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, **tokens, **settings))


def _accelerator(num_micro_batches: int = 1, mixed_precision: str = "no", **plugin: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"} | plugin
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=FullyShardedDataParallelPlugin(**plugin),
        gradient_accumulation_steps=num_micro_batches,
        mixed_precision=mixed_precision,
    )
    if mixed_precision == "fp16":  # which it does on GPUs alone
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _batch(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * index + dist.get_rank())
    start = torch.randint(VOCAB, (2, 1), generator=generator)
    return (start + torch.arange(CONTEXT)) % VOCAB


def _loss(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


class Trained:
    """A training through the adapter."""

    def __init__(
        self,
        method: str,
        *,
        is_made: str = "by prepare",
        wire: dict[str, Any] | None = None,
        num_micro_batches: int = 1,
        mixed_precision: str = "no",
        settings: dict[str, Any] | None = None,
        accelerator: Any = None,
        **plugin: Any,
    ) -> None:
        from qsdp.integrations import accelerate

        self.num_micro_batches = num_micro_batches
        self.accelerator = accelerator or _accelerator(num_micro_batches, mixed_precision, **plugin)
        model: Any = _model(**(settings or {}))
        optimizer, make = _adamw(model), METHODS[method]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.99)
        later = None
        if is_made == "before":
            optimizer = make(model, optimizer)
        elif method != "plain":
            later = make
        if is_made == "after":
            model, optimizer = self.accelerator.prepare(model, optimizer)
        config = qsdp.QSDPConfig(**(WIRE if wire is None else wire))
        self.model, self.optimizer, self.scheduler, self.handle = accelerate.prepare(
            self.accelerator, model, optimizer, scheduler, wire=config, method=later
        )
        self.passes = accelerate.StepPasses(
            self.accelerator, self.model, self.optimizer, self._loss_of
        )
        self.zeros: list[int] = []
        """What is pruned of this rank's shards in each pass."""
        self.losses: list[float] = []
        """Of each pass."""
        self.failure: Callable[[], Any] = contextlib.nullcontext
        """What the next passes are spoilt by."""
        self.left_out = 0
        """Steps that a GradScaler has left out."""

    def _loss_of(self, tokens: Tensor) -> Tensor:
        self.zeros.append(_num_zeros(self))
        with self.failure():
            loss = _loss(self.model, tokens)
        self.losses.append(float(loss.detach()))
        return loss

    def take(self, steps: range) -> list[float]:
        losses, number = [], self.num_micro_batches
        for index in range(steps.start * number, steps.stop * number):
            with self.accelerator.accumulate(self.model):
                losses.append(float(self.passes.run(_batch(index))))
                self.optimizer.step()
                self.left_out += self.accelerator.sync_gradients and self.optimizer.step_was_skipped
                self.scheduler.step()
                self.optimizer.zero_grad()
        return losses


def _num_zeros(trained: Trained) -> int:
    named = trained.model.named_parameters()
    return sum(int((p.to_local() == 0).sum()) for name, p in named if name.endswith("proj.weight"))


def _by_hand(method: str, num_micro_batches: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same training in a loop that knows no adapter, with CrAM's closure."""
    model = _model()
    accelerator = _accelerator(num_micro_batches)
    model, prepared = accelerator.prepare(model, _adamw(model))
    handle = qsdp.install(model, qsdp.QSDPConfig(**WIRE))
    optimizer = METHODS[method](model, prepared.optimizer)
    if method != "plain":
        optimizer.share_support(handle.set_support)
    losses: list[float] = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            kept = []
            for micro in range(num_micro_batches):
                model.set_requires_gradient_sync(micro == num_micro_batches - 1)
                loss = _loss(model, _batch(step * num_micro_batches + micro))
                torch.autograd.backward(loss / num_micro_batches)
                kept.append(float(loss.detach()))
            if len(losses) < (step + 1) * num_micro_batches:
                losses.extend(kept)
            return torch.tensor(sum(kept))

        if method == "cram":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
            optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.99 * 0.99  # Accelerate counts a step for each rank
    return losses, _weights(model)


def _both(method: str, num_micro_batches: int, kinds: list[str]) -> tuple[Any, list[Any], Any]:
    with fsdp2_on_cpus():
        by_hand = _by_hand(method, num_micro_batches)
    adapted, seen = [], []
    for is_made in kinds:
        with fsdp2_on_cpus():
            trained = Trained(method, is_made=is_made, num_micro_batches=num_micro_batches)
            adapted.append((trained.take(range(STEPS)), _weights(trained.model)))
            seen.append((trained.zeros, _num_zeros(trained)))
    return by_hand, adapted, seen


ALL = ["by prepare", "before", "after"]


@pytest.mark.parametrize(
    ("method", "num_micro_batches", "kinds"),
    [
        ("cram", 2, ALL),
        ("acdc", 2, ["before"]),
        *(
            pytest.param(method, number, ALL, marks=pytest.mark.heavy)
            for method in ("plain", "cram", "acdc", "gmp")
            for number in (1, 3)
        ),
    ],
)
def test_a_training_has_the_numbers_of_a_loop_by_hand(
    run: Run, method: str, num_micro_batches: int, kinds: list[str]
) -> None:
    results = run(2, _both, method, num_micro_batches, kinds)
    for by_hand, adapted, _ in results:
        for losses, weights in adapted:
            torch.testing.assert_close(losses, by_hand[0], rtol=0, atol=0)
            torch.testing.assert_close(weights, by_hand[1], rtol=0, atol=0)
    size = sum(w.numel() for name, w in results[0][1][0][1].items() if name.endswith("proj.weight"))
    for kind in range(len(kinds)):
        of_ranks = [seen[kind] for *_, seen in results]
        in_passes = [sum(zeros) for zeros in zip(*(zeros for zeros, _ in of_ranks), strict=True)]
        at_the_end = sum(zeros for _, zeros in of_ranks)
        if method == "cram":
            step = [0] * num_micro_batches + [int(SPARSITY * size)] * num_micro_batches
            assert in_passes == step * STEPS
        assert at_the_end == {"acdc": int(SPARSITY * size), "gmp": int(0.6 * size)}.get(method, 0)


def _resumed(method: str, steps: int, wire: dict[str, Any], folder: str) -> tuple[Any, Any]:
    later = range(steps // 2, steps)
    with fsdp2_on_cpus():
        trained = Trained(method, wire=wire)
        trained.take(range(later.start))
        trained.accelerator.save_state(folder)
        went_on = trained.take(later), _weights(trained.model), trained.scheduler.get_last_lr()
    with fsdp2_on_cpus():
        trained = Trained(method, wire=wire)
        trained.accelerator.load_state(folder)
        resumed = trained.take(later), _weights(trained.model), trained.scheduler.get_last_lr()
    return went_on, resumed


DELTA = {"weight_bits": 4, "gather": "delta"}
LEARNED = {"grad_bits": 4, "levels": "learned", "level_steps": (2, 6)}


@pytest.mark.parametrize(
    ("method", "steps", "wire"),
    [
        ("acdc", 30, WIRE),
        ("cram", 8, DELTA),
        pytest.param("plain", 30, WIRE, marks=pytest.mark.heavy),
        pytest.param("cram", 30, WIRE, marks=pytest.mark.heavy),
        pytest.param("plain", 30, LEARNED, marks=pytest.mark.heavy),
        pytest.param("plain", 30, {"budget": 5.0}, marks=pytest.mark.heavy),
        pytest.param("acdc", 30, DELTA, marks=pytest.mark.heavy),
    ],
)
def test_a_training_goes_on_from_a_saved_state_bit_for_bit(
    run: Run, tmp_path: Path, method: str, steps: int, wire: dict[str, Any]
) -> None:
    for went_on, resumed in run(2, _resumed, method, steps, wire, str(tmp_path)):
        torch.testing.assert_close(resumed, went_on, rtol=0, atol=0)


def _mixed(method: str, settings: dict[str, Any]) -> tuple[Any, ...]:
    with fsdp2_on_cpus():
        trained = Trained(method, **settings)
        losses = trained.take(range(STEPS))
        inner, scaler = trained.optimizer.optimizer, trained.accelerator.scaler
        assert (scaler is not None) == (settings.get("mixed_precision") == "fp16")
        counts = (
            trained.left_out,
            getattr(inner, "num_steps", 0),
            getattr(inner, "skipped_steps", 0),
        )
        rate = trained.scheduler.get_last_lr()[0]
        return losses, rate, counts, _num_zeros(trained), trained.zeros[-1]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("acdc", {"mixed_precision": "fp16"}),
        ("cram", {"mixed_precision": "fp16", "num_micro_batches": 3}),
        *(
            pytest.param(method, setting, marks=pytest.mark.heavy)
            for method in ("plain", "cram", "acdc", "gmp")
            for setting in (
                {"mixed_precision": "fp16", "is_made": "before"},
                {"mixed_precision": "fp16", "is_made": "after", "num_micro_batches": 3},
                {"mixed_precision": "bf16", "num_micro_batches": 3},
                {"activation_checkpointing": True},
            )
        ),
    ],
)
def test_methods_prune_and_schedules_step_in_mixed_precision(
    run: Run, method: str, settings: dict[str, Any]
) -> None:
    results = run(2, _mixed, method, settings)
    for losses, rate, counts, _, _ in results:
        assert losses[-1] < losses[0] - 0.1
        left_out = int(settings.get("mixed_precision") == "fp16")  # the scale begins too high
        assert rate == pytest.approx(1e-2 * 0.99 ** (2 * (STEPS - left_out)))
        of_method = {"cram": (STEPS, left_out), "plain": (0, 0)}.get(method, (STEPS - left_out, 0))
        assert counts == (left_out, *of_method)
    end, inside = (sum(column) for column in [*zip(*results, strict=True)][-2:])
    assert (end > 0) == (method in ("acdc", "gmp"))
    assert method != "cram" or inside > 0


def _dropped() -> tuple[list[float], Tensor, Tensor]:
    """Losses of both passes at the same weights, and what a generator draws after them."""
    settings = {"weight_bits": 32, "grad_bits": 32}
    with fsdp2_on_cpus():
        trained = Trained(
            "dropout", wire=settings, num_micro_batches=2, settings={"attention_dropout": 0.5}
        )
        trained.take(range(2))
        after = torch.rand(3)
    with fsdp2_on_cpus():
        plain = Trained(
            "plain", wire=settings, num_micro_batches=2, settings={"attention_dropout": 0.5}
        )
        plain.take(range(2))
        return trained.losses, after, torch.rand(3)


def test_the_second_pass_draws_the_random_numbers_of_the_first(run: Run) -> None:
    for losses, after, after_plain in run(2, _dropped):
        assert losses[0:2] == losses[2:4]
        assert losses[4:6] == losses[6:8]
        assert len({*losses}) == 4
        assert torch.equal(after, after_plain)


def _fail(*_: object) -> None:
    raise KeyError("spoilt")


@contextlib.contextmanager
def _failing(model: Any, where: str) -> Any:
    """Inside, a forward pass fails, or the backward pass of what it gives, or what follows it."""
    layer = model.model.layers[0]
    hooks: dict[str, Callable[[], Any]] = {
        "forward": lambda: layer.mlp.register_forward_pre_hook(_fail),
        "backward": lambda: layer.register_forward_hook(
            lambda *args: args[-1].register_hook(_fail) and None
        ),
    }
    hook = hooks[where]() if where in hooks else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
    if where in ("loss", "second"):
        _fail()


def _give_up(trained: Trained, way: str, folder: str) -> None:
    """Take one micro-batch of two, and give the step up."""
    accelerator, model, passes = trained.accelerator, trained.model, trained.passes
    if way == "load_state":
        accelerator.save_state(folder)
    raises = way in ("loss", "forward", "backward", "second")
    spared = iter([contextlib.nullcontext()] * 2 if way == "second" else [])
    for index in (90, 91)[: 1 + raises]:
        if index == 91:
            trained.failure = lambda: next(spared, None) or _failing(model, way)
        failed = False
        with contextlib.suppress(KeyError), accelerator.accumulate(model):
            failed = index == 91
            passes.run(_batch(index))
            failed = False
        assert failed == (index == 91)
    trained.failure = contextlib.nullcontext
    if way == "load_state":
        accelerator.load_state(folder)
    elif way == "abandon_step":
        trained.handle.abandon_step()
        model.zero_grad()
    elif way == "reset":
        passes.reset()
    elif way == "evaluation":  # which the wire notices, and drops what was not reduced
        with contextlib.suppress(KeyError), _failing(model, "forward"):
            _loss(model, _batch(0))
    accelerator.step = 0


WAYS = ["loss", "forward", "backward", "second", "load_state", "abandon_step", "reset"]


def _given_up(folder: str, *, syncs_each: bool) -> list[str]:
    """The ways of giving a step up after which the next one is another than without it."""
    ways = [*WAYS, *["evaluation"] * (not syncs_each)]
    steps: list[Any] = []
    wrong = []
    for gives_up in (False, True):
        with fsdp2_on_cpus():
            trained = Trained(
                "unclipped", num_micro_batches=2, wire={"weight_bits": 32, "grad_bits": 32}
            )
            trained.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = syncs_each
            for step, way in enumerate(ways):
                if gives_up:
                    _give_up(trained, way, f"{folder}/{way}-{syncs_each}")
                trained.take(range(step, step + 1))
                steps.append((trained.losses[-4:], _weights(trained.model)))
                if gives_up and not _are_equal(steps[step], steps[-1]):
                    wrong.append(f"{way}, {syncs_each=}")
    return wrong


def _are_equal(left: object, right: object) -> bool:
    try:
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def _given_up_in_all_ways(folder: str) -> list[str]:
    return [each for syncs in (False, True) for each in _given_up(folder, syncs_each=syncs)]


def test_a_step_that_was_given_up_leaves_nothing_to_the_next(run: Run, tmp_path: Path) -> None:
    assert run(2, _given_up_in_all_ways, str(tmp_path)) == [[], []]


def _clipped() -> dict[str, float]:
    """By method, the norm of the gradient that the base is given."""
    norms = {}
    for method in ("plain", "unclipped"):
        with fsdp2_on_cpus():
            trained = Trained(method)
            trained.passes.run(_batch(0))
            trained.passes.clip_grad_norm_(0.01)
            grads = [p.grad.full_tensor() for p in trained.model.parameters()]
            norms[method] = float(torch.nn.utils.get_total_norm(grads))
    return norms


def test_cram_plus_is_clipped_at_twice_the_norm(run: Run) -> None:
    for norms in run(2, _clipped):
        assert norms == pytest.approx({"plain": 0.01, "unclipped": 0.02}, rel=1e-3)


def _one_after_another(folder: str) -> dict[str, Any]:
    """Two models of one accelerator, the second with two wires, and the first freed meanwhile."""
    from qsdp.integrations import accelerate

    with fsdp2_on_cpus():
        first = Trained("acdc")
        accelerator, model = first.accelerator, weakref.ref(first.model)
        first.take(range(2))
        accelerator.free_memory()
        second = Trained("acdc", accelerator=accelerator)
        second.handle.remove()
        *_, handle = accelerate.prepare(accelerator, second.model, second.optimizer)
        second.take(range(3))
        hooks = accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook
        saved = first.handle.state_dict(), handle.state_dict()
        accelerator.save_state(folder)
        second.take(range(3, 4))
        gone_on = handle.state_dict() != saved[1]
        accelerator.load_state(folder)
        found = {
            "hooks": [*map(len, hooks)],
            "folders": sorted(path.name for path in Path(folder).glob("qsdp_*")),
            "is loaded": gone_on and (first.handle.state_dict(), handle.state_dict()) == saved,
        }
        del first
        gc.collect()
        return found | {"first is kept": model() is not None}


def test_checkpoints_have_each_wire_once_and_keep_no_model(run: Run, tmp_path: Path) -> None:
    wanted = {"hooks": [1, 1], "folders": ["qsdp_0"], "is loaded": True, "first is kept": False}
    assert run(2, _one_after_another, str(tmp_path)) == [wanted] * 2


def _over_epochs() -> list[list[int]]:
    """What each step of two epochs of 3 batches a rank has seen, 2 to be accumulated."""
    steps: list[list[int]] = []
    with fsdp2_on_cpus():
        trained = Trained("unclipped", num_micro_batches=2)
        passes, loss_of = trained.passes, trained.passes.loss_of
        rows = torch.arange(10)[:, None].expand(-1, CONTEXT)
        loader = trained.accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
        for syncs_each in (False, True):
            trained.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = syncs_each
            seen: list[int] = []
            passes.loss_of = lambda tokens, seen=seen: (  # type: ignore[misc]
                seen.append(int(tokens[0, 0])) or loss_of(tokens)
            )
            for tokens in loader:
                with trained.accelerator.accumulate(trained.model):
                    passes.run(tokens)
                    trained.optimizer.step()
                    trained.optimizer.zero_grad()
                if trained.accelerator.sync_gradients:
                    steps.append(seen.copy())
                    seen.clear()
        assert trained.optimizer.optimizer.num_steps == len(steps)
    return steps


def test_the_last_step_of_an_epoch_has_what_is_left_in_both_passes(run: Run) -> None:
    for rank, steps in enumerate(run(2, _over_epochs)):
        assert steps == [[2 * rank, 2 * rank + 4] * 2, [[8, 0][rank]] * 2] * 2


def _refusals() -> dict[str, str]:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from qsdp.integrations import accelerate

    said: dict[str, str] = {}

    def attempt(name: str, *given: Any, **more: Any) -> None:
        try:
            accelerate.prepare(*given, **more)
        except ValueError as error:
            said[name] = str(error)

    model = _model()
    optimizer = _adamw(model)
    with fsdp2_on_cpus():
        attempt("no plugin", Accelerator(cpu=True), model, optimizer)
    with fsdp2_on_cpus():
        attempt(
            "FSDP1",
            _accelerator(fsdp_version=1, reshard_after_forward="FULL_SHARD"),
            model,
            optimizer,
        )
    with fsdp2_on_cpus():
        accelerator = _accelerator()
        accelerator.state.distributed_type = DistributedType.DEEPSPEED
        attempt("DeepSpeed", accelerator, model, optimizer)
    with fsdp2_on_cpus():
        accelerator = _accelerator()
        attempt("swapped", accelerator, optimizer, model)
        attempt("two models", accelerator, model, optimizer, _model())
        cram = METHODS["cram"](model, optimizer)
        attempt("two methods", accelerator, model, cram, method=METHODS["cram"])
        model, prepared, _ = accelerate.prepare(accelerator, model, cram)
        attempt("twice", accelerator, model, prepared)
        try:
            accelerate.StepPasses(accelerator, model, prepared, lambda _: _).clip_grad_norm_(2.0)
        except ValueError as error:
            said["two norms"] = str(error)
    with fsdp2_on_cpus():
        model = _model()
        accelerator = _accelerator()
        attempt("no function", accelerator, model, _adamw(model), method="cram")
        assert accelerator._models == []
        model, prepared = accelerator.prepare(model, _adamw(model))
        attempt("nothing made", accelerator, model, prepared, method=lambda *_: None)
        attempt("its base", accelerator, model, prepared, method=METHODS["plain"])
        attempt("one prepared", accelerator, model, _adamw(model))
        attempt("the other", accelerator, _model(), prepared)
    return said


def test_what_cannot_be_prepared_is_refused_in_one_sentence(run: Run) -> None:
    first, second = run(2, _refusals)
    assert first == second
    plugin = "fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)"
    for name, words in (
        ("no plugin", f"trains with MULTI_CPU: make it with {plugin}"),
        ("FSDP1", f"trains with FSDP1: make it with {plugin}"),
        ("DeepSpeed", f"trains with DEEPSPEED: make it with {plugin}"),
        ("swapped", "AdamW, LlamaForCausalLM are given: give one model, its optimizer"),
        ("two models", "LlamaForCausalLM, AdamW, LlamaForCausalLM are given"),
        ("two methods", "method would wrap a CrAM: leave out one of the two."),
        ("no function", "method is a str: give a function that makes it."),
        ("nothing made", "method has made None: return CrAM, ACDC, GMP or SAM."),
        ("its base", "method has made AdamW: return CrAM, ACDC, GMP or SAM."),
        ("two norms", "CrAM clips at its max_norm, and clip_grad_norm_ at 2.0: leave one out."),
        ("twice", "LlamaForCausalLM has the wire already: prepare it once."),
        ("one prepared", "only the model of the two is prepared: give both"),
        ("the other", "only the optimizer of the two is prepared: give both"),
    ):
        assert words in first.pop(name)
    assert first == {}


def _prepared() -> bool:
    """Whether the optimizer has the model's parameters, of which a rank has nothing."""
    from qsdp.integrations import accelerate

    with fsdp2_on_cpus():
        accelerator = _accelerator(auto_wrap_policy="no_wrap")
        model: Any = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 1))
        model, optimizer = accelerator.prepare(model, _adamw(model))
        model, optimizer, _ = accelerate.prepare(accelerator, model, optimizer)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        return [*map(id, stepped)] == [*map(id, model.parameters())]


def test_what_was_prepared_already_keeps_its_parameters(run: Run) -> None:
    assert run(2, _prepared) == [True, True]


def _example(code: str, folder: str) -> list[str]:
    leftovers.kept_open.add("pyarrow")  # which a loader of Accelerate's may import
    with fsdp2_on_cpus(), contextlib.chdir(folder), mock.patch.dict(os.environ, ON_CPUS):
        exec(code, {"__name__": "__main__"})
        dist.barrier()
        return sorted(path.name for path in Path("checkpoint").iterdir())


def test_the_example_of_the_documents_runs(run: Run, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    code = text.split("## Accelerate")[1].split("```python")[1].split("```")[0]
    for names in run(2, _example, code, str(tmp_path)):
        assert {"pytorch_model_fsdp_0", "optimizer_0", "qsdp_0", "scheduler.bin"} <= {*names}
