"""peft with qsdp: which parameters are adapters, what is sent, and what CrAM prunes of a base."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qsdp
from benchmarks.wire import adapters
from tests_distributed.support import leftovers
from tests_distributed.support.accelerate_on_cpus import fsdp2_on_cpus
from tests_distributed.support.running import Run

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

PRELOADED = ["accelerate", "peft", "transformers.models.llama.modeling_llama"]
ROOT = Path(__file__).parents[2]
STEPS, SPARSITY = 30, 0.5
PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
ADAPTERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LoraConfig": ({"r": 4, "target_modules": ["q_proj", "v_proj"]}, ["lora_A", "lora_B"]),
    "LoHaConfig": ({"r": 4, "target_modules": ["q_proj"]}, ["hada_w"]),
    "IA3Config": (
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ["ia3_l"],
    ),
    "OFTConfig": (
        {"target_modules": ["q_proj"], "oft_block_size": 8, "use_cayley_neumann": False},
        ["oft_R"],
    ),
    "PromptTuningConfig": ({"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, ["prompt_encoder"]),
    "VeraConfig": ({"r": 4, "target_modules": ["q_proj"]}, ["vera_lambda"]),
}
"""Settings of each kind, and what the names of its parameters have."""


def _with(kind: str) -> Any:
    import peft

    model = adapters.lora(4).unload()
    settings, _ = ADAPTERS[kind]
    return peft.get_peft_model(model, getattr(peft, kind)(**settings))


def _sharded(model: Any) -> Any:
    for module in [*model.modules()]:
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module)
    fully_shard(model)
    return model


Row = tuple[str, str, bool]


def _rows(model: Any, **settings: Any) -> dict[str, Row]:
    """How each parameter travels, and whether it is a vector."""
    from qsdp.integrations import peft

    config = peft.wire(model, **settings)
    handle = qsdp.install(_sharded(model), config)
    assert config.gather == "once"
    return {row.name: (row.weight, row.grad, len(row.shape) < 2) for row in handle.report().rows}


def _kinds(kinds: list[str]) -> dict[str, tuple[dict[str, Row], list[str]]]:
    from qsdp.integrations import peft

    models = {kind: _with(kind) for kind in kinds}
    return {kind: (_rows(model), peft.base_weights(model)) for kind, model in models.items()}


@pytest.mark.parametrize("kinds", [pytest.param([*ADAPTERS], id="all")])
def test_adapters_of_every_kind_travel_at_eight_bits(run: Run, kinds: list[str]) -> None:
    for kind, (rows, patterns) in run(1, _kinds, kinds)[0].items():
        _, words = ADAPTERS[kind]
        own = {name for name in rows if any(word in name for word in words)}
        assert own, kind
        for name, (weight, grad, is_vector) in rows.items():
            if name in own:
                expected = ("raw float32", "raw") if is_vector else ("8 bits", "8 bits")
            else:
                is_outside = "embed_tokens" in name or "lm_head" in name
                bits = "8 bits" if is_outside else "4 bits"
                expected = ("raw float32" if is_vector else bits, "none")
            assert (weight, grad) == expected, (kind, name)
        assert len(patterns) == len(PROJECTIONS), kind
        for pattern, projection in zip(patterns, PROJECTIONS, strict=True):
            assert f".layers.*.{projection}" in pattern
            assert pattern.endswith(".weight")


MORE_KINDS: dict[str, dict[str, Any]] = {
    "PrefixTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "MultitaskPromptTuningConfig": {"num_virtual_tokens": 4, "num_tasks": 2},
    "CPTConfig": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 1},
    "AdaLoraConfig": {"target_modules": ["q_proj"], "total_step": 10},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "LoKrConfig": {"r": 4, "target_modules": ["q_proj"]},
    "ShadowConfig": {},
    "TrainableTokensConfig": {"token_indices": [1, 2]},
    "VBLoRAConfig": {
        "target_modules": ["q_proj"],
        "r": 4,
        "num_vectors": 8,
        "vector_length": 8,
        "topk": 2,
    },
}


@pytest.mark.parametrize("kind", [*ADAPTERS, *MORE_KINDS])
@pytest.mark.parametrize("is_trained", [True, False])
def test_what_the_base_lacks_is_an_adapter_trained_or_not(kind: str, is_trained: bool) -> None:
    import peft as library

    from qsdp.integrations import peft

    base = adapters.lora(4).unload()
    own = {id(parameter) for parameter in base.parameters()}
    settings = MORE_KINDS[kind] if kind in MORE_KINDS else ADAPTERS[kind][0]
    made = getattr(library, kind)(**{"task_type": "CAUSAL_LM", **settings})
    model: Any = library.get_peft_model(base, made)
    if not is_trained:
        model.requires_grad_(False)
    config = peft.wire(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            expected = None if id(parameter) in own else (peft.ADAPTER_BITS,) * 2
            assert config.bits_by_policy(name) == expected, name
    assert not {*peft.base_weights(model)} & {
        n for n, p in model.named_parameters() if id(p) not in own
    }


def _choices() -> tuple[Any, Any, Any]:
    """A policy of the user's; a second adapter, frozen; what is trained beside adapters."""
    from peft import LoraConfig

    policy = _rows(_with("LoraConfig"), policy=(("*lora_A*", 16),), weight_bits=8, grad_bits=4)
    two = _with("LoraConfig")
    two.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"]))
    more = _with("LoraConfig")
    more.get_submodule("base_model.model.model.layers.1.mlp.up_proj").requires_grad_(True)
    return policy, _rows(two), _rows(more)


def test_settings_go_first_and_only_what_is_neither_added_nor_trained_is_base(run: Run) -> None:
    policy, two, more = run(1, _choices)[0]
    layer = "base_model.model.model.layers.{}.{}.weight"
    lora_a, lora_b = (f"self_attn.q_proj.lora_{part}.default" for part in "AB")
    assert policy[layer.format(1, lora_a)][:2] == ("bfloat16", "bfloat16")
    assert policy[layer.format(1, lora_b)][:2] == ("8 bits", "8 bits")
    assert policy[layer.format(1, "mlp.up_proj")][:2] == ("8 bits", "none")
    assert two[layer.format(0, "self_attn.o_proj.lora_A.other")][:2] == ("8 bits", "none")
    assert two[layer.format(0, "self_attn.o_proj.base_layer")][:2] == ("4 bits", "none")
    assert more[layer.format(1, "mlp.up_proj")][:2] == ("8 bits", "8 bits")
    assert more[layer.format(0, "mlp.up_proj")][:2] == ("4 bits", "none")


def test_a_base_is_sent_once_and_costs_no_loss(run: Run) -> None:
    stock, eight, four, once = run(2, adapters.measure, 12, 4)[0]
    assert once.gathered < four.gathered / 10
    assert four.gathered < eight.gathered < stock.gathered / 3
    for row in (eight, four, once):
        assert row.loss == pytest.approx(stock.loss, abs=0.02)
        assert row.loss != stock.loss


def _parts(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole base, and the whole adapters."""
    whole = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    own = {name: value for name, value in whole.items() if "lora_" in name}
    return {name: value for name, value in whole.items() if name not in own}, own


def _compressed_base() -> tuple[Any, ...]:
    """Zeros of base and adapters in each of CrAM's passes; how they change in a training."""
    from qsdp.integrations import peft

    model = _sharded(adapters.lora(4))
    handle = qsdp.install(model, peft.wire(model, bucket_size=64))
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    optimizer = qsdp.CrAM(model, base, sparsity=SPARSITY, prunable=peft.base_weights(model))
    optimizer.share_support(handle.set_support)
    before, zeros, losses = _parts(model), [], []

    def num_zeros(word: str, *, is_adapter: bool) -> int:
        named = model.named_parameters()
        own = [p for name, p in named if word in name and ("lora_" in name) == is_adapter]
        return sum(int((p.to_local() == 0).sum()) for p in own if p.ndim == 2)

    for step in range(10):
        tokens = adapters.batch(step)

        def closure(tokens: Tensor = tokens) -> Tensor:
            zeros.append([num_zeros("layers", is_adapter=which) for which in (False, True)])
            loss: Tensor = model(input_ids=tokens, labels=tokens).loss
            torch.autograd.backward(loss)
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    return before, _parts(model), zeros, losses


def test_cram_compresses_the_base_and_trains_the_adapters(run: Run) -> None:
    results = run(2, _compressed_base)
    for before, after, zeros, losses in results:
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        assert all(not torch.equal(after[1][name], value) for name, value in before[1].items())
        assert all(of_adapters == 0 for _, of_adapters in zeros[2:])  # B begins at zero
        assert losses[-1] < losses[0] - 0.03
    size = sum(v.numel() for n, v in before[0].items() if "layers" in n and v.ndim == 2)
    of_base = [[of_base for of_base, _ in zeros] for *_, zeros, _ in results]
    assert [sum(each) for each in zip(*of_base, strict=True)] == [0, int(SPARSITY * size)] * 10


def _prunes_nothing(name: str) -> list[str]:
    import warnings

    from qsdp.integrations import peft

    model = _sharded(adapters.lora(4))
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        schedule = 9 if name == "ACDC" else qsdp.GMPSchedule.of(9, 0.5)
        getattr(qsdp, name)(model, base, schedule=schedule, prunable=peft.base_weights(model))
    return [str(each.message) for each in seen]


@pytest.mark.parametrize("name", ["ACDC", pytest.param("GMP", marks=pytest.mark.heavy)])
def test_a_method_that_prunes_no_frozen_base_says_so(run: Run, name: str) -> None:
    said = run(2, _prunes_nothing, name)[0]
    assert len(said) == 1
    assert said[0].startswith(f"{name} prunes nothing, because all of its prunable weights are")


def _accelerated(folder: str) -> tuple[Any, Any]:
    """Train, save in the middle, go on, save the adapters; and go on from the middle anew."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    from qsdp.integrations import accelerate, peft

    def start() -> Any:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = adapters.lora(4)
        base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        config = peft.wire(model, bucket_size=64)
        model, optimizer, _ = accelerate.prepare(accelerator, model, base, wire=config)
        return accelerator, model, optimizer

    def take(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            tokens = adapters.batch(step)
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()

    half = STEPS // 2
    with fsdp2_on_cpus():
        accelerator, model, optimizer = start()
        take(accelerator, model, optimizer, range(half))
        accelerator.save_state(f"{folder}/state")
        take(accelerator, model, optimizer, range(half, STEPS))
        whole = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            f"{folder}/adapter", is_main_process=accelerator.is_main_process, state_dict=whole
        )
        went_on = _parts(model)
    with fsdp2_on_cpus():
        accelerator, model, optimizer = start()
        accelerator.load_state(f"{folder}/state")
        take(accelerator, model, optimizer, range(half, STEPS))
        return went_on, _parts(model)


def test_adapters_are_saved_and_a_training_goes_on_bit_for_bit(run: Run, tmp_path: Path) -> None:
    from peft import PeftModel

    for went_on, resumed in run(2, _accelerated, str(tmp_path)):
        torch.testing.assert_close(resumed, went_on, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(adapters.lora(4).unload(), str(tmp_path / "adapter"))
    own = {name: p.detach() for name, p in loaded.named_parameters() if "lora_" in name}
    torch.testing.assert_close(own, went_on[1], rtol=0, atol=0)


def _refusal(call: str) -> str:
    from qsdp.integrations import peft

    try:
        getattr(peft, call)(adapters.lora(4).unload())
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("call", ["wire", "base_weights"])
def test_a_model_without_adapters_is_refused(call: str) -> None:
    assert _refusal(call) == (
        "LlamaForCausalLM has no adapters: give what peft.get_peft_model has returned."
    )


def _example(code: str, folder: str) -> list[str]:
    leftovers.kept_open.add("pyarrow")  # which a loader of Accelerate's may import
    environment = {"ACCELERATE_USE_CPU": "true"}
    with fsdp2_on_cpus(), contextlib.chdir(folder), mock.patch.dict(os.environ, environment):
        exec(code, {"__name__": "__main__"})
        dist.barrier()
        return sorted(path.name for path in Path("adapter").iterdir())


def test_the_example_of_the_documents_runs(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "integrations.md").read_text()
    code = text.split("## peft")[1].split("```python")[1].split("```")[0]
    for names in run(2, _example, code, str(tmp_path)):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {*names}
