"""Promises of the GPT: its function, its initial weights, its samples, its cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qsdp.models.generate import generate
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import INIT_STD, init_weights
from qsdp.models.gpt2.model import GPT, flops_per_token
from qsdp.models.gpt2.presets import PRESETS

TINY = GPTConfig(vocab_size=11, num_layers=2, num_heads=2, width=8, context=6)


def make(seed: int = 0, **changes: object) -> GPT:
    model = GPT(dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]
    init_weights(model, seed)
    return model


def random_tokens(batch_size: int = 3, num_tokens: int = 6) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (batch_size, num_tokens))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(tie_weights: bool) -> None:
    model = make(tie_weights=tie_weights)
    tokens, targets = random_tokens(), random_tokens()
    logits, no_loss = model(tokens)
    no_logits, loss = model(tokens, targets)
    assert no_loss is None
    assert no_logits is None
    log_p = logits.double().log_softmax(-1)
    expected = -log_p.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_a_token_does_not_see_those_after_it() -> None:
    model = make()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % TINY.vocab_size
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_every_parameter_gets_a_gradient() -> None:
    for model in (make(), make(tie_weights=False, bias=False)):
        model(random_tokens(), random_tokens())[1].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.count_nonzero(), name


def test_the_loss_is_fp32_in_a_bf16_model() -> None:
    model = make().bfloat16()
    tokens, targets = random_tokens(), random_tokens()
    loss = model(tokens, targets)[1]
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(model(tokens)[0].float().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout=0.5)
    tokens = random_tokens()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    torch.testing.assert_close(model(tokens)[0], make()(tokens)[0], rtol=0, atol=0)


def test_presets_have_the_published_sizes() -> None:
    millions = {}
    for name in PRESETS:
        config = GPTConfig.from_preset(
            name, vocab_size=65 if name in ("tiny", "nano", "mini") else None
        )
        with torch.device("meta"):
            model = GPT(config)
        millions[name] = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(
        {
            "tiny": 0.106880,
            "nano": 0.804096,
            "mini": 4.771328,
            "gpt2": 124.439808,
            "gpt2-medium": 354.823168,
            "gpt2-large": 774.030080,
            "gpt2-xl": 1557.611200,
            "gpt-1.3b": 1315.723264,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"width": 9}, "width 9 cannot be split over 2 heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_an_impossible_size_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def test_an_unknown_preset_and_a_missing_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no model preset 'gpt3'.*'gpt2-xl'"):
        GPTConfig.from_preset("gpt3")
    with pytest.raises(ValueError, match="set vocab_size"):
        GPTConfig.from_preset("nano")


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens exceeds the model's context of 6"):
        make()(random_tokens(num_tokens=7))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_model_from_the_meta_device_gets_the_same_weights(tie_weights: bool) -> None:
    # Large enough for an embedding of several generator blocks, the last one partial.
    size = dataclasses.replace(TINY, vocab_size=40_000, tie_weights=tie_weights)
    plain = GPT(size)
    with torch.device("meta"):
        emptied = GPT(size)
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        init_weights(emptied, 5)
    emptied.to_empty(device="cpu")
    state = torch.get_rng_state()
    for model in (plain, emptied):
        init_weights(model, 5)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(emptied.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_weights_depend_on_the_seed_and_on_the_name() -> None:
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    for (name, p), q, r in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        assert p.ndim == 1 or not torch.equal(p, r), name
    state = first.state_dict()
    assert not torch.equal(state["blocks.0.mlp.up.weight"], state["blocks.1.mlp.up.weight"])


def test_weights_have_the_standard_deviation_of_gpt2() -> None:
    model = make(width=64, num_layers=8, vocab_size=2000)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.count_nonzero()
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            # One standard deviation of the estimate is std / sqrt(2 n): five of them.
            std = INIT_STD / 4 if name.endswith(("out.weight", "down.weight")) else INIT_STD
            margin = 5 * std / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(std, abs=margin), name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="the seed is -1"):
        make(seed=-1)


def test_samples_repeat_with_the_seed_and_keep_the_prompt() -> None:
    model = make()
    prompts = random_tokens(num_tokens=2)
    first = generate(model, prompts, 9, seed=3)
    assert first.shape == (3, 11)
    assert first.dtype == torch.int64
    assert torch.equal(first[:, :2], prompts)
    assert torch.equal(first, generate(model, prompts, 9, seed=3))
    assert not torch.equal(first, generate(model, prompts, 9, seed=4))
    assert model.training


def test_temperature_zero_a_tiny_one_and_top_one_take_the_most_likely_token() -> None:
    model = make()
    prompts = random_tokens(num_tokens=6)
    best = model(prompts)[0][:, -1].argmax(-1)
    for options in ({"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 1}):
        assert torch.equal(generate(model, prompts, 1, **options)[:, -1], best)


def test_top_k_samples_the_k_most_likely_tokens_and_no_others() -> None:
    model = make()
    prompts = random_tokens(batch_size=1, num_tokens=3).expand(400, 3)
    allowed = model(prompts[:1])[0][0, -1].topk(3).indices
    sampled = generate(model, prompts, 1, temperature=5.0, top_k=3)[:, -1]
    assert set(sampled.tolist()) == set(allowed.tolist())


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"num_tokens": -1}, {"top_k": 0}, {"tokens_BT": [[]]}]
)
def test_impossible_sampling_is_refused(options: dict[str, object]) -> None:
    arguments = {"tokens_BT": random_tokens(), "num_tokens": 1} | options
    arguments["tokens_BT"] = torch.as_tensor(arguments["tokens_BT"])
    with pytest.raises(ValueError):
        generate(make(), **arguments)  # type: ignore[arg-type]


def test_a_diverged_model_is_not_sampled_from() -> None:
    model = make()
    model.norm_out.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, random_tokens(), 1, top_k=3)
    assert model.training


def test_the_stated_cost_is_the_counted_one() -> None:
    model = make()
    # The plain kernel is made of matrix products, which the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(random_tokens(batch_size=3, num_tokens=4), random_tokens(3, 4))[1].backward()
    assert counter.get_total_flops() == 12 * flops_per_token(TINY, seq_len=4)
    assert flops_per_token(TINY) == flops_per_token(TINY, seq_len=6)
