"""What every solver does, however it chooses: in memory, in a stream, and where it is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qsdp import oneshot
from qsdp.commands.compress import main
from qsdp.export import export_compressed, read_facts
from qsdp.oneshot.registry import SOLVERS, solver_of
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable
from qsdp.sparsity.prune_and_round import prune_and_round_
from qsdp.train.trained_model import open_trained_model
from tests.support.compression_reference import kept
from tests.support.small_gpt import SIZE, save_model
from tests.support.solvers import calibrated
from tests.support.solvers.by_chance import whole_scores

TARGETS = {
    "0.6": {"sparsity": 0.6},
    "0.7+layer+3bit": {"sparsity": 0.7, "layer": True},
    "2:4": {"pattern": (2, 4)},
}


@pytest.fixture(autouse=True)
def solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("by_chance", "calibrated"):
        monkeypatch.setitem(SOLVERS, name, f"tests.support.solvers.{name}")


def prunable_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    prunable = Prunable.of(model)
    return {n: p.detach() for n, p in zip(prunable.names, prunable.parameters, strict=True)}


@pytest.mark.usefixtures("gloo_of_one")
@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_scores_stay_streamed_as_in_memory(tmp_path: Path, target: str) -> None:
    model = save_model(tmp_path)
    before = {name: weights.clone() for name, weights in prunable_weights(model).items()}
    scores = [whole_scores(i, tuple(w.shape)) for i, w in enumerate(before.values())]
    expected = kept(scores, [1] * len(scores), **TARGETS[target])  # type: ignore[arg-type]
    masks = oneshot.compress_(model, target, method="by_chance")
    for (name, weights), mask in zip(prunable_weights(model).items(), expected, strict=True):
        assert torch.equal(masks[name].unpack(), mask)
        assert not weights[~mask].view(torch.int32).any()
        if "bit" not in target:
            assert torch.equal(weights[mask], before[name][mask])
    path, out = tmp_path / "checkpoints" / "step-00000007", tmp_path / "out"
    facts = export_compressed(path, SIZE, Compression.of(target), out, method="by_chance")
    assert facts["method"] == read_facts(out)["method"] == "by_chance"
    assert open_trained_model(out).method == "by_chance"
    written, packed = load_file(out / "model.safetensors"), load_file(out / "masks.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name].view(torch.int32), parameter.detach().view(torch.int32))
    assert packed.keys() == masks.keys()
    assert all(torch.equal(packed[name], mask.bits) for name, mask in masks.items())


@pytest.mark.usefixtures("gloo_of_one")
def test_magnitudes_decide_unless_another_method_is_named(tmp_path: Path) -> None:
    one, other = save_model(tmp_path), save_model(tmp_path / "other")
    other.load_state_dict(one.state_dict())
    prunable = Prunable.of(other)
    with oneshot.compressed(one, "0.5+4bit") as weights:
        inside = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = oneshot.compress_(one, "0.5+4bit")
    with torch.no_grad():
        expected = prune_and_round_(prunable.shards(), Compression.of("0.5+4bit"), prunable.dims)
    for name, weight, mask in zip(prunable.names, prunable.parameters, expected, strict=True):
        assert torch.equal(weight, inside[name])
        assert torch.equal(weight, one.get_parameter(name))
        assert torch.equal(mask.bits, masks[name].bits)


def test_a_solver_that_needs_tokens_gets_them_and_no_other(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    tokens = torch.tensor([[3, 4], [5, 6]])
    with oneshot.compressed(model, 0.5, method="calibrated", tokens=tokens):
        assert not model.blocks[0].weight.any()
    assert calibrated.seen.pop() == 18
    assert model.blocks[0].weight.all()
    with pytest.raises(ValueError, match="'calibrated' needs calibration tokens, which no"):
        oneshot.compress_(model, 0.5, method="calibrated")
    with pytest.raises(ValueError, match="'magnitude' uses no calibration tokens: give none"):
        oneshot.compress_(model, 0.5, tokens=tokens)
    path = tmp_path / "none"
    with pytest.raises(ValueError, match="needs calibration tokens"):
        export_compressed(path, SIZE, Compression(bits=4), path, method="calibrated")
    with pytest.raises(ValueError, match=r"method is 'obs': choose one of .*magnitude, by_chance"):
        oneshot.compress_(model, 0.5, method="obs")
    assert model.blocks[0].weight.all()


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ({}, "odd_solver is registered, but has no SOLVER: let it end with SOLVER = "),
        ({"SOLVER": len}, "SOLVER in odd_solver is <built-in function len>: let it be a Solver"),
    ],
)
def test_a_solver_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: dict[str, object], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "odd_solver", SimpleNamespace(**module))
    monkeypatch.setitem(SOLVERS, "odd", "odd_solver")
    with pytest.raises(ValueError, match=said):
        solver_of("odd")


@pytest.mark.usefixtures("gloo_of_one")
def test_the_command_says_which_method_and_older_exports_are_magnitude(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path)
    for method, said in (("magnitude", "to 0.5: "), ("by_chance", "to 0.5 by by_chance: ")):
        flags = [str(tmp_path), "--sparsity", "0.5", "--out", str(tmp_path / method)]
        main([*flags, "--method", method])
        assert said in capfd.readouterr().out
    facts = tmp_path / "magnitude" / "compression.json"
    content = json.loads(facts.read_text())
    assert content.pop("method") == "magnitude"
    del content["checksums"], content["checksum"]  # which they had not either
    facts.write_text(json.dumps(content))
    assert open_trained_model(tmp_path / "magnitude").method == "magnitude"
    assert open_trained_model(tmp_path).method is None
    facts.write_text(json.dumps(content | {"method": 3}))
    with pytest.raises(ValueError, match="was not written by"):
        read_facts(tmp_path / "magnitude")
