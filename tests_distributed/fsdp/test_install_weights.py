"""What the ranks compute with, and what reaches the owner of a gradient, under ``qsdp.install``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import qsdp
from tests_distributed.support.helpers import (
    Toy,
    full_grads,
    full_state,
    make_batch,
    make_model,
    shard,
)
from tests_distributed.support.running import Run

Seen = dict[str, list[tuple[str, Tensor]]]
"""By parameter name: (phase, the whole weight) in the order of use."""

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"


class Watch:
    """Records the weights that each module of a model computes with, and when.

    Set ``in_backward`` when a backward pass begins: a forward hook that runs then is recomputation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.in_backward = False
        self.seen: Seen = {}
        for name, module in model.named_modules():
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if own:
                see = self._seer(f"{name}.", module, own)
                module.register_forward_pre_hook(self._before(see))
                module.register_forward_hook(self._after(see))

    def _seer(self, prefix: str, module: nn.Module, own: list[str]) -> Callable[[str], None]:
        def see(phase: str) -> None:
            for key in own:
                value = module.get_parameter(key).detach()
                assert not isinstance(value, DTensor)
                self.seen.setdefault(prefix + key, []).append((phase, value.clone()))

        return see

    def _before(self, see: Callable[[str], None]) -> Callable[..., None]:
        return lambda module, args: see(RECOMPUTE if self.in_backward else FORWARD)

    def _after(self, see: Callable[[str], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad and not self.in_backward:
                output.register_hook(lambda _: see(BACKWARD))

        return hook


def _one_pass(model: Toy, watch: Watch, seed: int) -> None:
    watch.in_backward = False
    loss = model(*make_batch(model, seed))
    watch.in_backward = True
    torch.autograd.backward(loss)


def _prefetch(model: Toy) -> None:
    for block, following in zip(model.blocks, [*model.blocks][1:], strict=False):
        block.set_modules_to_forward_prefetch([following, following.mlp])
        following.set_modules_to_backward_prefetch([block, block.mlp])


def _watched(way: str, config: dict[str, Any]) -> tuple[Seen, dict[str, Tensor], Any]:
    model = make_model(1, checkpointing=True, frozen=way == "frozen", tied=way == "tied")
    options: dict[str, Any] = {}
    if way == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if way == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    reshard: Any = {"gathered once": False, "regathered by two": 2}.get(way, True)
    shard(model, reshard=reshard, **options)
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=64, **config))
    if way == "prefetched":
        _prefetch(model)
    watch = Watch(model)
    if way == "unsharded first":
        model.unshard()
        pending = model.blocks[1].unshard(async_op=True)
        assert pending is not None
        pending.wait()
    _one_pass(model, watch, 1)
    return watch.seen, full_state(model), handle.report()


WAYS = {
    "plain": (3, {}),
    "dithered": (2, {"rounding": "dither", "weight_bits": 3}),
    "frozen": (3, {"rounding": "stochastic"}),
    "tied": (2, {"rounding": "nearest"}),
    "gathered once": (3, {"weight_bits": 4}),
    "regathered by two": (4, {"weight_bits": 4}),
    "hsdp": (4, {"weight_bits": 4}),
    "bf16": (3, {}),
    "prefetched": (2, {}),
    "unsharded first": (2, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_and_passes_see_the_same_quantized_weights(run: Run, way: str) -> None:
    ranks, config = WAYS[way]
    results = run(ranks, _watched, way, config)
    _, exact, report = results[0]
    is_raw = {row.name: row.weight.startswith("raw") for row in report.rows}
    first = {name: views[0][1] for name, views in results[0][0].items()}
    assert len(first) >= len(exact)
    for seen, _, _ in results:
        assert seen.keys() == first.keys()
        for name, views in seen.items():
            assert all(torch.equal(value, first[name]) for _, value in views), name
            phases = {phase for phase, _ in views}
            in_block = name.startswith("blocks")
            assert phases >= {FORWARD, RECOMPUTE} if in_block else phases >= {FORWARD}
            assert BACKWARD in phases or name == "embed.weight", name
    bits = config.get("weight_bits", 8)
    for name, value in exact.items():
        as_seen, whole = first[name].float(), value.to(first[name].dtype).float()
        if is_raw[name]:
            assert torch.equal(as_seen, whole), name
        else:
            assert not torch.equal(as_seen, whole), name
            step = (whole.max() - whole.min()) / (2**bits - 1)
            most = 0.5 if config.get("rounding") != "stochastic" else 1.0
            slack = 1.01 if way != "bf16" else 2.0
            assert (as_seen - whole).abs().max() <= most * slack * step, name
    remarks = " ".join(report.remarks)
    assert ("HSDP" in remarks and "full precision" in remarks) == (way == "hsdp")
    assert ("second gathers" in remarks and "raw" in remarks) == (way == "regathered by two")


def _steps_seen() -> list[Tensor]:
    model = shard(make_model(2))
    qsdp.install(model, qsdp.QSDPConfig(bucket_size=64))
    watch = Watch(model)
    for micro in range(5):  # the third and the last are synchronised
        model.set_requires_gradient_sync(micro in (2, 4))
        _one_pass(model, watch, micro)
    return [value for phase, value in watch.seen["head.weight"] if phase == FORWARD]


def test_a_step_draws_new_random_numbers_and_its_micro_batches_share_them(run: Run) -> None:
    for views in run(2, _steps_seen):
        assert all(torch.equal(view, views[0]) for view in views[:3])
        assert torch.equal(views[3], views[4])
        assert not torch.equal(views[0], views[3])


def _pruned_seen(rounding: str, bits: int) -> list[tuple[Tensor, Tensor]]:
    model = make_model(3)
    generator = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape, generator=generator) < 0.6] = 0.0
            if name == "head.weight":
                parameter.zero_()
    shard(model)
    qsdp.install(model, qsdp.QSDPConfig(weight_bits=bits, bucket_size=16, rounding=rounding))
    watch = Watch(model)
    _one_pass(model, watch, 1)
    exact = full_state(model)
    return [(exact[n], v) for n in exact if n in watch.seen for _, v in watch.seen[n]]


@pytest.mark.parametrize(
    ("rounding", "bits"), [("shift", 2), ("dither", 3), ("stochastic", 8), ("nearest", 4)]
)
def test_a_pruned_weight_stays_zero_across_the_wire(run: Run, rounding: str, bits: int) -> None:
    for pairs in run(3, _pruned_seen, rounding, bits):
        assert len(pairs) > 20
        assert any((exact == 0).sum() > 100 for exact, _ in pairs)
        for exact, seen in pairs:
            assert not seen[exact == 0].any()
            assert not seen[exact == 0].signbit().any()


def _non_finite_gradients(value: float, at: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients over the wire, and this rank's own, when one value goes bad on rank ``at``."""

    def poison(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0, 0, 0] = value if dist.get_rank() == at else grad[0, 0, 0]
        return grad

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(poison)

    model, plain = shard(make_model(4)), make_model(4)
    qsdp.install(model, qsdp.QSDPConfig(bucket_size=8))
    for each in (model, plain):
        each.norm.register_forward_hook(hook)
        torch.autograd.backward(each(*make_batch(each, 1)))
    return full_grads(model), full_grads(plain)


@pytest.mark.parametrize(("value", "at"), [(float("nan"), 0), (float("nan"), 2), (float("inf"), 1)])
def test_non_finite_gradients_reach_their_owner(run: Run, value: float, at: int) -> None:
    results = run(3, _non_finite_gradients, value, at)
    plain = results[at][1]
    num_coded = 0
    for sharded, _ in results:
        for name, grad in sharded.items():
            bad = ~plain[name].isfinite()
            assert not grad[bad].isfinite().any(), name
            num_coded += int(bad.any() and grad.dim() > 1)
            if not bad.any():
                assert grad.isfinite().all(), name
    assert num_coded > 0


class Fork(nn.Module):
    """Three linear layers of one shape, of which a pass uses those it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x_BC: Tensor, names: str) -> Tensor:
        for name in names:
            x_BC = self.get_submodule(name)(x_BC)
        return x_BC.square().sum()


def _forked(uses: list[str], later: bool) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Gradients over the wire, and exact ones, of passes that use some of the layers.

    ``b`` has 4 bits, ``a`` and ``c`` travel raw: a mistaken identity would show.
    """
    results = []
    torch.manual_seed(1)
    model, plain = Fork(), Fork()
    plain.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    policy = (("b.*", 4), ("*", 32))
    qsdp.install(model, qsdp.QSDPConfig(policy=policy, bucket_size=8))
    x_BC = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    for use in uses:
        if later:  # a first part of the layers in an unsynchronised micro-batch
            model.set_requires_gradient_sync(False)
            torch.autograd.backward(model(x_BC, use[:1]))
            model.set_requires_gradient_sync(True)
        torch.autograd.backward(model(x_BC, use))
        got = full_grads(model)
        model.zero_grad()

        if later:
            torch.autograd.backward(plain(x_BC, use[:1]))
        torch.autograd.backward(plain(x_BC, use))
        expected = full_grads(plain)
        plain.zero_grad()
        for grad in expected.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        results.append((got, expected))
    return results


@pytest.mark.parametrize("later", [False, True])
def test_a_gradient_is_never_mistaken_for_another_of_its_size(run: Run, later: bool) -> None:
    uses = ["a", "c", "ac", "a", "ca", "c"]
    for results in run(3, _forked, uses, later):
        for use, (got, expected) in zip(uses, results, strict=True):
            assert got.keys() == {f"{name}.weight" for name in use}
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    uses = ["ab", "b", "a", "bc", "cab"]
    for results in run(3, _forked, uses, later):
        for use, (got, expected) in zip(uses, results, strict=True):
            assert got.keys() == {f"{name}.weight" for name in use}
            if "b" in use:
                assert not torch.allclose(got["b.weight"], expected["b.weight"], rtol=1e-4)
                scale = float(expected["b.weight"].abs().max())
                difference = got.pop("b.weight") - expected.pop("b.weight")
                assert float(difference.abs().max()) < scale
            if "b" not in use:  # else b's quantized weight is in the way of the others' gradients
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
