"""Wrappers do not change what a model's parameters are called, wherever they are named or saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qsdp
from qsdp import checkpoint
from qsdp.common.model_structure import embedding_names
from qsdp.compat.parameter_names import clean_names, named_buffers, named_parameters
from qsdp.export import export_compressed, load_export
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.gmp.schedule import GMPSchedule
from qsdp.methods.sam.optimizer import SAM
from qsdp.models.gpt2.config import GPTConfig
from qsdp.models.gpt2.init import init_weights
from qsdp.models.gpt2.model import GPT
from qsdp.models.huggingface.weights import export_huggingface, load_huggingface_weights
from qsdp.oneshot.in_memory import compressed
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import prunable_parameters
from tests_distributed.support.helpers import all_ranks, make_batch, make_model

pytestmark = pytest.mark.usefixtures("gloo_of_one")

PATTERNS = ["blocks.1.qkv.weight", "blocks.*.mlp.*.weight"]


def _compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def _blocks(*wraps: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wraps every block, the first of ``wraps`` being the innermost."""

    def wrap(model: Any) -> Any:
        for i, block in enumerate(model.blocks):
            for each in wraps:
                block = each(block)
            model.blocks[i] = block
        return model

    return wrap


BLOCKS = {
    "plain": _blocks(),
    "compiled": _blocks(_compiled),
    "checkpointed": _blocks(checkpoint_wrapper),
    "checkpointed, compiled": _blocks(checkpoint_wrapper, _compiled),
    "compiled, checkpointed": _blocks(_compiled, checkpoint_wrapper),
}
WRAPS = BLOCKS | {
    "whole compiled": _compiled,
    "whole checkpointed": checkpoint_wrapper,
    "ddp": DistributedDataParallel,
    "blocks compiled, ddp": lambda m: DistributedDataParallel(BLOCKS["compiled"](m)),
    "blocks checkpointed, ddp": lambda m: DistributedDataParallel(BLOCKS["checkpointed"](m)),
    "ddp compiled": lambda m: _compiled(DistributedDataParallel(m)),
    "ddp checkpointed": lambda m: checkpoint_wrapper(DistributedDataParallel(m)),
}
wrapped = pytest.mark.parametrize("wrap", list(WRAPS))
wrapped_blocks = pytest.mark.parametrize("wrap", list(BLOCKS))


def _values(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@wrapped
@pytest.mark.parametrize("patterns", [None, PATTERNS], ids=["default", "patterns"])
def test_the_prunable_set_is_that_of_the_model_as_written(wrap: str, patterns: Any) -> None:
    plain, model = make_model(1), WRAPS[wrap](make_model(1))
    assert list(named_parameters(model)) == [name for name, _ in plain.named_parameters()]
    expected = prunable_parameters(plain, patterns)
    assert expected
    _assert_same(_values(prunable_parameters(model, patterns)), _values(expected))
    with compressed(plain, "0.5+layer", patterns) as pruned:
        expected = _values(pruned)
    with compressed(model, "0.5+layer", patterns) as pruned:
        _assert_same(_values(pruned), expected)


METHODS: dict[str, Any] = {
    "cram": lambda m, base: CrAM(m, base, sparsity=["0.5+layer", 0.9], prunable=PATTERNS),
    "sam": SAM,
    "acdc": lambda m, base: ACDC(
        m,
        base,
        schedule=ACDCSchedule(steps=4, warmup=1, phase=1, last_dense=1, last_sparse=1),
        target="0.5+layer",
        prunable=PATTERNS,
    ),
    "gmp": lambda m, base: GMP(
        m, base, schedule=GMPSchedule.of(4, 0.8, start=1, every=1), prunable=PATTERNS
    ),
}


def _trained(model: Any, method: str) -> Any:
    """The optimizer after four steps."""
    optimizer = METHODS[method](model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(4):

        def closure() -> Any:
            optimizer.zero_grad()
            loss = model(*make_batch(make_model(), step))  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    return optimizer


# A wrapper goes with one of the two methods, DDP with both; all else is heavy.
CHOSEN = {
    *itertools.product(("cram", "acdc"), ("ddp",)),
    *(("cram", "compiled"), ("acdc", "checkpointed")),
    *(("cram", wrap) for wrap in ("checkpointed, compiled", "whole compiled", "ddp checkpointed")),
    *(("acdc", wrap) for wrap in ("plain", "compiled, checkpointed", "whole checkpointed")),
    *(("acdc", wrap) for wrap in ("blocks checkpointed, ddp", "ddp compiled")),
    *(("cram", "blocks compiled, ddp"), ("sam", "ddp"), ("gmp", "ddp")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "wrap"),
    [
        pytest.param(*each, marks=() if each in CHOSEN else pytest.mark.heavy)
        for each in [*itertools.product(("cram", "acdc"), WRAPS), ("sam", "ddp"), ("gmp", "ddp")]
    ],
)
def test_optimizers_take_the_same_steps_and_their_checkpoints_fit(
    method: str, wrap: str, tmp_path: Path
) -> None:
    plain, model = make_model(1), WRAPS[wrap](make_model(1))
    expected, found = _trained(plain, method), _trained(model, method)
    weights = _values(dict(plain.named_parameters()))
    assert found.prunable.names == expected.prunable.names
    _assert_same(_values(named_parameters(model)), weights)
    if method in ("acdc", "gmp"):
        _assert_same(found.masks(), expected.masks())

    # Saved by the one, loaded by the other.
    for i, (source, own, target) in enumerate([(model, found, plain), (plain, expected, model)]):
        path = checkpoint.save(tmp_path / str(i), 4, source, own, {})
        fresh = make_model(2) if target is plain else WRAPS[wrap](make_model(2))
        optimizer = METHODS[method](fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-2))
        checkpoint.load(path, fresh, optimizer)
        _assert_same(_values(named_parameters(fresh)), weights)
        state = expected.state_dict()["state"]
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
        alone = make_model(3) if target is plain else WRAPS[wrap](make_model(3))
        checkpoint.load_model(path, alone)
        _assert_same(_values(named_parameters(alone)), weights)


@wrapped_blocks
def test_a_gpt_is_made_compressed_and_exported_as_without(wrap: str, tmp_path: Path) -> None:
    size = GPTConfig.from_preset("tiny", vocab_size=13)

    def make(seed: int, wrap: str = wrap) -> Any:
        model = BLOCKS[wrap](GPT(size))
        init_weights(model, seed)
        return model

    weights = _values(dict(make(1, "plain").named_parameters()))
    model = make(1)
    _assert_same(_values(named_parameters(model)), weights)

    path = checkpoint.save(tmp_path, 1, model, None, {})
    target = Compression.of("0.5+layer")
    patterns = ["blocks.*.mlp.*.weight"]
    export_compressed(path, size, target, tmp_path / "export", patterns=patterns)
    exported = load_file(tmp_path / "export/model.safetensors")
    other = make(2)
    load_export(tmp_path / "export", other)
    with compressed(model, target, patterns):
        expected = _values(named_parameters(model))
        _assert_same({name: exported.pop(name) for name in expected}, expected)
        assert not exported
        _assert_same(_values(named_parameters(other)), expected)

    export_huggingface(model, tmp_path / "theirs")
    load_huggingface_weights(other, tmp_path / "theirs")
    _assert_same(_values(named_parameters(other)), weights)


@wrapped_blocks
def test_a_wire_names_parameters_as_without(wrap: str) -> None:
    def installed(wrap: str) -> tuple[Any, Any]:
        model = BLOCKS[wrap](make_model(1, tied=True))
        for block in model.blocks:
            fully_shard(block, mesh=all_ranks())
        fully_shard(model, mesh=all_ranks())
        policy = (("blocks.0.qkv.weight", 4), ("blocks.*.mlp.*", 3))
        handle = qsdp.install(model, qsdp.QSDPConfig(policy=policy, bucket_size=64))
        return handle.report(), handle.errors()

    assert installed(wrap) == installed("plain")


class _Encoder(nn.Module):
    """A user's own attribute ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleList([nn.Linear(3, 3)])
        self.register_buffer("lr", torch.ones(2))


class _Fields(nn.Module):
    """Named as what optimizers keep."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.ones(3))
        self.params = nn.Parameter(torch.ones(3))
        self.exp_avg = nn.Linear(3, 3)
        self.mask = _Encoder()
        self.state = nn.Linear(3, 3)
        self.register_buffer("lr", torch.ones(2))


NESTINGS: dict[str, list[Any]] = {
    "ddp": [DistributedDataParallel],
    "compiled": [_compiled],
    "ckpt": [checkpoint_wrapper],
    "ddp compiled": [DistributedDataParallel, _compiled],
    "compiled ddp": [_compiled, DistributedDataParallel],
    "ddp ckpt": [DistributedDataParallel, checkpoint_wrapper],
    "ckpt ddp": [checkpoint_wrapper, DistributedDataParallel],
    "compiled ckpt": [_compiled, checkpoint_wrapper],
    "ckpt compiled": [checkpoint_wrapper, _compiled],
    "compiled ckpt ddp": [_compiled, checkpoint_wrapper, DistributedDataParallel],
}
"""The first is the innermost."""


@pytest.mark.parametrize("method", [pytest.param("adamw", marks=pytest.mark.heavy), "acdc"])
@pytest.mark.parametrize("nesting", list(NESTINGS))
@pytest.mark.parametrize("kind", [_Encoder, _Fields])
def test_a_checkpoint_is_that_of_the_model_whatever_its_parts_are_called(
    kind: Callable[[], Any], nesting: str, method: str, tmp_path: Path
) -> None:
    def make(is_wrapped: bool, seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = kind()
        for wrap in NESTINGS[nesting] if is_wrapped else []:
            model = wrap(model)
        for value in (*model.parameters(), *model.buffers()):
            nn.init.normal_(value)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if method == "adamw":
            return model, base
        schedule = ACDCSchedule(steps=4, warmup=1, phase=1, last_dense=1, last_sparse=1)
        return model, ACDC(model, base, schedule=schedule, prunable=["*weight"])

    def values(model: Any) -> dict[str, Tensor]:
        return _values(named_parameters(model) | named_buffers(model))

    for is_wrapped in (True, False):
        model, optimizer = make(is_wrapped, 1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        path = checkpoint.save(tmp_path / str(is_wrapped), 1, model, optimizer, {})
        other, fresh = make(not is_wrapped, 2)
        checkpoint.load(path, other, fresh)
        _assert_same(values(other), values(model))
        state = optimizer.state_dict()["state"]
        assert state
        torch.testing.assert_close(fresh.state_dict()["state"], state, rtol=0, atol=0)
        if method == "acdc":
            assert not all(mask.all() for mask in optimizer.masks().values())
            _assert_same(fresh.masks(), optimizer.masks())
        alone, _ = make(not is_wrapped, 3)
        checkpoint.load_model(path, alone)
        _assert_same(values(alone), values(model))


@pytest.mark.parametrize("wrap", [nn.Sequential, _compiled, DistributedDataParallel])
def test_a_users_own_module_keeps_its_name(wrap: Any) -> None:
    name = "0.module.0.weight" if wrap is nn.Sequential else "module.0.weight"
    assert list(prunable_parameters(wrap(_Encoder()))) == [name]


def test_two_parameters_with_one_name_are_refused() -> None:
    model = DistributedDataParallel(nn.Linear(3, 3))
    model.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"'weight' and 'module\.weight' are both 'weight' once"):
        prunable_parameters(model, ["*"])


@pytest.mark.parametrize("wrap", [_compiled, checkpoint_wrapper], ids=["compiled", "checkpointed"])
def test_a_wrapped_head_is_a_head(wrap: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), wrap(nn.Linear(4, 9, bias=False)))
    clean = clean_names(model, embedding_names(model))
    assert set(clean.values()) == {"0.weight", "2.weight"}
