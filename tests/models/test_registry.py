"""Promises of the registry, and what every family in it keeps."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsdp.commands.parsing import parse
from qsdp.models import registry
from qsdp.models.gpt2.family import GPT2
from qsdp.models.huggingface.weights import export_huggingface
from qsdp.models.language_model import LanguageModel
from qsdp.models.spec import ModelSpec

each_family = pytest.mark.parametrize(
    "family", [pytest.param(family, id=name) for name, family in registry.families().items()]
)


@dataclass(frozen=True, kw_only=True)
class OtherSize:
    vocab_size: int = 7
    num_layers: int = 1
    width: int = 4
    context: int = 5


class Other(GPT2):
    sizes: Any = OtherSize
    presets: Any = {"other-small": {}}  # noqa: RUF012
    training: Any = {}  # noqa: RUF012
    transformers = None


def register(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> ModelSpec[Any]:
    """Another family, ``other``, with these attributes changed."""
    family = type("Changed", (Other,), changes)()
    monkeypatch.setitem(sys.modules, "other_family", SimpleNamespace(FAMILY=family))
    monkeypatch.setitem(registry.FAMILIES, "other", "other_family")
    return family


def test_a_registered_family_is_found_by_its_presets_and_by_its_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = registry.preset_defaults()
    assert registry.DEFAULT_PRESET in before
    other = register(monkeypatch, training={"other-small": {"steps": 3}})
    assert registry.preset_defaults() == before | {"other-small": {"steps": 3}}
    assert list(registry.preset_defaults()) == [*before, "other-small"]
    assert registry.family_of("other-small") is other
    assert registry.family_of_size(OtherSize()) is other
    assert other.size_of_preset("other-small", 9) == OtherSize(vocab_size=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": {"nano": {}}}, "gpt2 and other both have the preset nano"),
        ({"sizes": GPT2.sizes}, "gpt2 and other both have the sizes .*GPTConfig"),
        ({"transformers": GPT2.transformers}, "gpt2 and other both have the model_type gpt2"),
        ({"training": {"large": {}}}, r"other says how \['large'\] are trained"),
    ],
)
def test_what_two_families_would_share_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    register(monkeypatch, **changes)
    with pytest.raises(ValueError, match=message):
        registry.preset_defaults()


@dataclass(frozen=True, kw_only=True)
class SizeOfHeads(OtherSize):
    num_heads: int

    def __post_init__(self) -> None:
        if self.vocab_size < 1000 or self.num_heads == 3:
            raise ValueError("no such model")


def test_a_preset_without_a_field_of_its_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    presets: dict[str, dict[str, int]] = {"other-small": {"num_heads": 1}, "other-large": {}}
    register(monkeypatch, sizes=SizeOfHeads, presets=presets)
    message = "preset other-large of the family other makes no SizeOfHeads .*num_heads.*: give it"
    with pytest.raises(ValueError, match=message):
        registry.preset_defaults()
    presets["other-large"] = {"num_heads": 3, "heads": 2}
    with pytest.raises(ValueError, match=r"preset other-large .*'heads'.*: give it all fields"):
        registry.preset_defaults()
    # What a size says of its values it says when it is asked for, with the data's vocabulary.
    presets["other-large"] = {"num_heads": 3}
    assert {*presets} < {*registry.preset_defaults()}


class WithoutSizes(ModelSpec[Any]):
    build = init_weights = flops_per_token = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({}, r"other_family is registered, but has no FAMILY: let it end with FAMILY = \.\.\."),
        ({"FAMILY": Other}, "FAMILY in other_family is <class .*Other'>: let it be an object of a"),
        ({"FAMILY": WithoutSizes()}, "the family other has no sizes: give it some"),
    ],
)
def test_a_family_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "other_family", SimpleNamespace(**module))
    monkeypatch.setitem(registry.FAMILIES, "other", "other_family")
    with pytest.raises(ValueError, match=message):
        registry.preset_defaults()


def test_a_default_of_a_setting_that_there_is_not_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, training={"other-small": {"steps": 3, "warmup": 5}})
    with pytest.raises(ValueError, match="preset other-small has a default for 'warmup', which is"):
        parse(["--model", "other-small"])


def test_an_unknown_preset_or_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no model preset 'gpt3': choose one of .*'nano'"):
        registry.family_of("gpt3")
    with pytest.raises(ValueError, match="OtherSize is the size of no registered model"):
        registry.family_of_size(OtherSize())


def test_a_model_that_the_transformers_library_lacks_is_not_written_as_its(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(monkeypatch)
    model = LanguageModel()
    model.config = OtherSize()
    with pytest.raises(ValueError, match="OtherSize have no form in the transformers library"):
        export_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@each_family
def test_a_size_comes_back_from_a_file(family: ModelSpec[Any]) -> None:
    for preset in family.presets:
        size = family.size_of_preset(preset, 1000)
        assert size.vocab_size == 1000
        assert family.size(json.loads(json.dumps(asdict(size)))) == size


@each_family
def test_a_model_is_what_the_trainer_takes_it_for(family: ModelSpec[Any]) -> None:
    sizes = [family.size_of_preset(preset, 13) for preset in family.presets]
    size = replace(min(sizes, key=lambda each: each.width * each.context), num_layers=2)
    models = []
    for seed in (3, 3, 4):
        with torch.device("meta"):
            model = family.build(size)
        assert model.config == size
        assert len(model.blocks) == size.num_layers
        assert not list(model.buffers())
        with pytest.raises(ValueError, match="meta device"):
            family.init_weights(model, seed)
        model.to_empty(device="cpu")
        state = torch.get_rng_state()
        family.init_weights(model, seed)
        assert torch.equal(torch.get_rng_state(), state)
        models.append(model)
    model, same, other = models
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )

    tokens = torch.randint(13, (2, size.context))
    logits, nothing = model(tokens)
    assert nothing is None
    assert logits.shape == (2, size.context, 13)
    nothing, loss = model(tokens, tokens)
    assert nothing is None
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    torch.testing.assert_close(loss, expected)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 13
    torch.testing.assert_close(model(changed)[0][:, :-1], logits[:, :-1])
    with pytest.raises(ValueError, match="context"):
        model(torch.zeros(1, size.context + 1, dtype=torch.long))

    one = family.build(replace(size, num_layers=1))
    x = torch.randn(2, 5, size.width)
    assert one.blocks[0](x).shape == x.shape
    one.blocks = torch.nn.ModuleList()
    assert one(tokens)[0].shape == logits.shape
    assert 0 < family.flops_per_token(size, 1) <= family.flops_per_token(size, size.context)
