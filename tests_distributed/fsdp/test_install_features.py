"""Everything that FSDP2 lets a user do works the same with the wire of qsdp installed.

A scenario trains a little and returns gradients. With 32 bits they are those of stock FSDP2 up to
the order of sums; with 8 bits they are close.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

import qsdp
from qsdp.compat.interrupted_passes import abandon_pass
from tests_distributed.support.helpers import full_grads, full_state, make_batch, make_model, shard
from tests_distributed.support.running import Run

Install = Callable[[nn.Module], Any]
Grads = dict[str, Tensor]


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _backward(model: Any, seed: int = 1, **options: Any) -> None:
    torch.autograd.backward(model(*make_batch(model, seed)), **options)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(17 + dist.get_rank()))


def several_modules_in_a_group(install: Install) -> Grads:
    model = make_model(1)
    first, second = model.blocks
    fully_shard([first, second], mesh=_mesh())
    fully_shard([model.embed, model.norm], mesh=_mesh(), reshard_after_forward=False)
    fully_shard(model, mesh=_mesh())
    install(model)
    _backward(model)
    return full_grads(model)


def columns(install: Install) -> Grads:
    model = make_model(1, hidden=12, width=12, vocab_size=12)
    shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    install(model)
    _backward(model)
    return full_grads(model)


def prefetch(install: Install) -> Grads:
    model = shard(make_model(1))
    install(model)
    first, second = model.blocks
    model.set_modules_to_forward_prefetch([first, first.mlp])
    first.set_modules_to_forward_prefetch([second, second.mlp])
    second.set_modules_to_backward_prefetch([first, first.mlp])
    _backward(model)
    _backward(model, 2)
    return full_grads(model)


def unshard_first(install: Install) -> Grads:
    model = shard(make_model(1), reshard=False)
    install(model)
    model.unshard()
    for module in (*model.blocks, *(block.mlp for block in model.blocks)):
        module.unshard(async_op=True)
    _backward(model)
    return full_grads(model)


def accumulate_without_resharding(install: Install) -> Grads:
    model = shard(make_model(1))
    install(model)
    for micro in range(3):
        model.set_requires_gradient_sync(micro == 2)
        model.set_reshard_after_backward(micro == 2)
        _backward(model, micro)
    return full_grads(model)


def two_forwards_one_backward(install: Install) -> Grads:
    model = shard(make_model(1))
    install(model)
    losses = [model(*make_batch(model, seed)) for seed in (1, 2)]
    torch.autograd.backward(losses[0] + losses[1])
    return full_grads(model)


def two_backwards_of_one_forward(install: Install) -> Grads:
    model = shard(make_model(1), reshard=False)
    install(model)
    loss = model(*make_batch(model, 1))
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(2 * loss)
    return full_grads(model)


class Shared(nn.Module):
    """One layer used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 6)

    def forward(self, x_BC: Tensor) -> Tensor:
        for _ in range(3):
            x_BC = torch.tanh(self.inner(x_BC))
        return self.outer(x_BC).square().sum()

    def by_another_name(self, x_BC: Tensor) -> Tensor:
        return self.forward(x_BC)


def _shared(**unused: nn.Module) -> Any:
    torch.manual_seed(3)
    model = Shared()
    for name, module in unused.items():
        model.add_module(name, module)
    fully_shard(model.inner, mesh=_mesh())
    return fully_shard(model, mesh=_mesh())


def one_layer_used_thrice(install: Install) -> Grads:
    model = _shared()
    install(model)
    torch.autograd.backward(model(_noise(5, 6)))
    return full_grads(model)


def a_method_registered_as_forward(install: Install) -> Grads:
    model = _shared()
    register_fsdp_forward_method(model, "by_another_name")
    install(model)
    torch.autograd.backward(model.by_another_name(_noise(5, 6)))
    return full_grads(model)


def a_method_that_leaves_a_layer_out(install: Install) -> Grads:
    model = _shared(unused=nn.Linear(6, 6))
    register_fsdp_forward_method(model, "by_another_name")
    install(model)
    torch.autograd.backward(model.by_another_name(_noise(5, 6)))
    return full_grads(model)


class Fork(nn.Module):
    """One layer, then one of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 4)

    def forward(self, x_BC: Tensor, side: str, is_cut_short: bool = False) -> Tensor:
        x_BC = torch.tanh(self.first(x_BC))
        if is_cut_short:
            x_BC.register_hook(_fail)
        y_BC: Tensor = self.get_submodule(side)(x_BC)
        return y_BC.square().sum()


def after_a_backward_cut_short(install: Install) -> Grads:
    torch.manual_seed(3)
    model: Any = Fork()
    fully_shard(model.first, mesh=_mesh())
    fully_shard(model, mesh=_mesh())
    install(model)
    model(_noise(5, 6), "left").backward()
    model.zero_grad()
    with pytest.raises(LookupError):
        model(_noise(5, 6), "left", is_cut_short=True).backward()
    abandon_pass(model)
    model(_noise(5, 6), "right").backward()
    return full_grads(model)


class Mixed(nn.Module):
    """A trainable layer behind frozen weights of other types and odd sizes."""

    def __init__(self, small: torch.dtype, big: torch.dtype) -> None:
        super().__init__()
        self.low = nn.Linear(5, 5, dtype=torch.bfloat16).requires_grad_(False)
        self.codes = nn.Parameter(torch.arange(7, dtype=small), requires_grad=False)
        self.table = nn.Parameter(torch.randn(3, 5).half(), requires_grad=False)
        self.big = nn.Parameter(torch.arange(4, dtype=big), requires_grad=False)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 7)

    def forward(self, x_BC: Tensor) -> Tensor:
        x_BC = self.norm(self.low(x_BC.bfloat16()).float() + self.table.float().sum(0))
        return (self.out(x_BC) * (self.codes + self.big.sum())).square().mean()


def mixed_dtypes(install: Install) -> Grads:
    return _mixed(install, torch.bfloat16, torch.float16)


def mixed_with_integers(install: Install) -> Grads:
    return _mixed(install, torch.int8, torch.int64)


def _mixed(install: Install, *dtypes: torch.dtype) -> Grads:
    torch.manual_seed(4)
    model = Mixed(*dtypes)
    fully_shard(model, mesh=_mesh())
    install(model)
    torch.autograd.backward(model(_noise(5, 5)))
    return full_grads(model)


def no_grad_before_training(install: Install) -> Grads:
    model = shard(make_model(1), reshard=False)
    install(model)
    with torch.no_grad():
        model(*make_batch(model, 5))
    _backward(model)
    return full_grads(model)


def frozen_after_install(install: Install) -> Grads:
    model = shard(make_model(1))
    install(model)
    _backward(model)
    grads = {f"before.{name}": grad for name, grad in full_grads(model).items()}
    model.zero_grad()
    model.blocks[0].qkv.requires_grad_(False)
    model.head.requires_grad_(False)
    _backward(model)
    return grads | full_grads(model)


def trained_after_install(install: Install) -> Grads:
    model = shard(make_model(1, frozen=True))
    install(model)
    _backward(model)
    grads = {f"before.{name}": grad for name, grad in full_grads(model).items()}
    model.zero_grad()
    model.requires_grad_(True)
    _backward(model)
    return grads | full_grads(model)


class Halves(nn.Module):
    """One group, entered by a method of its own, which does not use all that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.thawed, self.unused = (nn.Linear(6, 6) for _ in range(3))
        self.thawed.requires_grad_(False)

    def by_another_name(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = self.thawed(torch.tanh(self.used(x_BC)))
        return y_BC.square().sum()


def trained_after_a_gather_and_entered_by_a_method(install: Install) -> Grads:
    torch.manual_seed(5)
    model: Any = fully_shard(Halves(), mesh=_mesh())
    model.unused.requires_grad_(False)
    register_fsdp_forward_method(model, "by_another_name")
    install(model)
    model.by_another_name(_noise(5, 6)).backward()
    model.zero_grad()
    model.requires_grad_(True)
    model.by_another_name(_noise(5, 6)).backward()
    return full_grads(model)


def only_blocks_sharded(install: Install) -> Grads:
    model = make_model(1)
    for block in model.blocks:
        fully_shard(block, mesh=_mesh())
    install(model)
    _backward(model)
    return full_grads(model)


def ignored_parameters(install: Install) -> Grads:
    model = make_model(1)
    shard(model, ignored_params={model.head.weight, model.blocks[0].norm1.weight})
    install(model)
    _backward(model)
    return full_grads(model)


def divided_by_seven(install: Install) -> Grads:
    model = shard(make_model(1))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Stock FSDP2 would multiply before the sum, which gloo cannot.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(7.0)
    install(model)
    _backward(model)
    return full_grads(model)


def all_reduced_later(install: Install) -> Grads:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    model = shard(make_model(1, unused=True), mesh=mesh)
    install(model)
    for micro in range(2):
        model.set_requires_all_reduce(micro == 1)
        _backward(model, micro)
    return full_grads(model)


def made_on_meta(install: Install) -> Grads:
    with torch.device("meta"):
        model = make_model(1)
    shard(model)
    install(model)
    model.to_empty(device="cpu")
    whole = make_model(1).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = whole[name].chunk(dist.get_world_size())
            if dist.get_rank() < len(rows):
                parameter.to_local().copy_(rows[dist.get_rank()])
    _backward(model)
    return full_grads(model)


def after_an_exception(install: Install) -> Grads:
    model = shard(make_model(1))
    install(model)
    handle = model.blocks[1].mlp.down.register_forward_hook(_fail)
    with pytest.raises(LookupError):
        model(*make_batch(model, 1))
    handle.remove()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return _again(model)


def _again(model: Any) -> Grads:
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
    _backward(model)
    return full_grads(model)


def _fail(*_: Any) -> None:
    raise LookupError


def separate_reduce_scatter_group(install: Install) -> Grads:
    model = shard(make_model(1))
    install(model)
    model.set_separate_reduce_scatter_group(True)
    _backward(model)
    return full_grads(model)


def unused_reduced_as_zeros(install: Install) -> Grads:
    model = shard(make_model(1, unused=True))
    install(model)
    model.set_reduce_scatter_unused_params(True)
    _backward(model)
    return full_grads(model)


def _three_ways(scenario: Callable[[Install], Grads]) -> list[Grads]:
    configs = [
        qsdp.QSDPConfig(weight_bits=32, grad_bits=32),
        qsdp.QSDPConfig(bucket_size=32, rounding="dither"),
    ]
    installs: list[Install] = [lambda model: None]
    installs += [lambda model, config=config: qsdp.install(model, config) for config in configs]
    return [scenario(install) for install in installs]


SCENARIOS: list[tuple[Callable[[Install], Grads], int]] = [
    (several_modules_in_a_group, 3),
    (columns, 2),
    (prefetch, 2),
    (unshard_first, 2),
    (accumulate_without_resharding, 2),
    (two_forwards_one_backward, 2),
    (two_backwards_of_one_forward, 2),
    (one_layer_used_thrice, 3),
    (a_method_registered_as_forward, 2),
    (a_method_that_leaves_a_layer_out, 2),
    (after_a_backward_cut_short, 2),
    (mixed_dtypes, 3),
    (no_grad_before_training, 2),
    (frozen_after_install, 2),
    (trained_after_install, 2),
    (trained_after_a_gather_and_entered_by_a_method, 2),
    (only_blocks_sharded, 3),
    (ignored_parameters, 2),
    (divided_by_seven, 3),
    (all_reduced_later, 4),
    (made_on_meta, 3),
    (after_an_exception, 2),
]
SINCE_2_13 = [
    (separate_reduce_scatter_group, 3),
    (unused_reduced_as_zeros, 2),
    (mixed_with_integers, 3),
]
if hasattr(FSDPModule, "set_separate_reduce_scatter_group"):
    SCENARIOS += SINCE_2_13


# As switches alone they are rows of test_fsdp2_settings.py.
HEAVY = {columns, prefetch, a_method_registered_as_forward, ignored_parameters, divided_by_seven}
HEAVY |= {all_reduced_later, separate_reduce_scatter_group, unused_reduced_as_zeros}


@pytest.mark.parametrize(
    ("scenario", "ranks"),
    [
        pytest.param(*each, marks=pytest.mark.heavy if each[0] in HEAVY else ())
        for each in SCENARIOS
    ],
    ids=[scenario.__name__ for scenario, _ in SCENARIOS],
)
def test_fsdp2_features_work(run: Run, scenario: Callable[[Install], Grads], ranks: int) -> None:
    for stock, full, coded in run(ranks, _three_ways, scenario):
        assert stock.keys() == full.keys() == coded.keys()
        assert len(stock) > 3
        torch.testing.assert_close(full, stock, rtol=1e-5, atol=1e-6)
        for name, expected in stock.items():
            if expected.any():
                error = (coded[name] - expected).norm() / expected.norm()
                assert 0 < error < 0.1 or expected.numel() == 1, (name, float(error))
            else:
                assert coded[name].abs().max() < 1e-4, name


def _alone(reshard: bool) -> tuple[Any, Any, dict[str, int], Any]:
    outcomes = []
    for is_installed in (False, True):
        model = shard(make_model(1, tied=True, unused=True), reshard=reshard)
        if is_installed:
            handle = qsdp.install(model, qsdp.QSDPConfig(weight_bits=2, grad_bits=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for step in range(2):
            _backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(full_state(model))
    return outcomes[0], outcomes[1], handle.traffic.snapshot(), handle.report()


@pytest.mark.parametrize("reshard", [True, False])
def test_one_rank_trains_exactly_and_the_report_says_so(run: Run, reshard: bool) -> None:
    ((stock, installed, traffic, report),) = run(1, _alone, reshard)
    torch.testing.assert_close(installed, stock, rtol=0, atol=0)
    assert set(traffic.values()) == {0}
    assert any("one rank" in remark for remark in report.remarks)


def _outside() -> tuple[list[str], Any]:
    model = make_model()
    shard(model, ignored_params={model.head.weight})
    report = qsdp.install(model).report()
    return [name for name, _ in model.named_parameters()], report


def test_the_report_lists_what_fsdp2_does_not_shard_too(run: Run) -> None:
    for names, report in run(2, _outside):
        assert [row.name for row in report.rows] == names
        head = next(row for row in report.rows if row.name == "head.weight")
        assert "not sharded" in head.why
        assert "head.weight" in str(report)


def _replicas() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(1), mesh=mesh)
    qsdp.install(model, qsdp.QSDPConfig(weight_bits=4, grad_bits=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(3):
        _backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.to_local() for name, p in model.named_parameters()}  # type: ignore[operator]


def test_replicas_stay_identical(run: Run) -> None:
    first, second, third, fourth = run(4, _replicas)
    torch.testing.assert_close(third, first, rtol=0, atol=0)
    torch.testing.assert_close(fourth, second, rtol=0, atol=0)
