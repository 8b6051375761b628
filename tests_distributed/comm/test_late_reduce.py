"""Reduces that are left to the wire bring, bit for bit, what reduces that are waited for bring."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import qsdp
from tests_distributed.support import helpers
from tests_distributed.support.helpers import Toy, all_ranks, shard
from tests_distributed.support.late import (
    MOST,
    Job,
    Way,
    add_another_model,
    keep_gradients,
    late_and_waiting,
    optimize_inside,
    reduce_outside_of_backward,
    take_two_models,
)
from tests_distributed.support.running import Run, selection

BF16, FP32 = torch.bfloat16, torch.float32

# --- ways to step ---------------------------------------------------------------------------------


def _micro_batches(job: Job, step: int, *, synced_each: bool) -> None:
    job.optimizer.zero_grad()
    for micro in range(2):
        job.model.set_requires_gradient_sync(synced_each or micro == 1)
        job.backward(job.loss(10 * step + micro))
    job.optimizer.step()


def _accumulated(job: Job, step: int) -> None:
    """The gradients of all steps add up."""
    job.backward(job.loss(step))
    job.optimizer.step()


def _set_to_zero(job: Job, step: int) -> None:
    job.optimizer.zero_grad(set_to_none=False)
    job.backward(job.loss(step))
    job.optimizer.step()


def _cram(job: Job, step: int) -> None:
    if step == 0:
        job.optimizer = qsdp.CrAM(job.model, job.optimizer, sparsity=0.5)
        job.optimizer.share_support(job.handle.set_support)

    def closure() -> Tensor:
        job.optimizer.zero_grad()
        loss = job.loss(step)
        job.backward(loss)
        return loss.detach()

    job.optimizer.step(closure)


def _reentrant(job: Job, step: int) -> None:
    def again(block: Any, *args: Any, **_: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=True)

    with mock.patch.object(helpers, "checkpoint", again):
        job.take(step)


def _graph_kept(job: Job, step: int, *, zero_between: bool) -> None:
    """Two backward passes of one forward pass."""
    job.optimizer.zero_grad()
    loss = job.loss(step)
    job.backward(loss, retain_graph=True)
    if zero_between:
        job.optimizer.zero_grad()
    job.backward(loss)
    job.optimizer.step()


def _input_gradient(job: Job, step: int) -> None:
    """``torch.autograd.grad`` of the blocks' input, before a backward pass and inside another."""
    job.optimizer.zero_grad()
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    keeping = job.model.blocks[0].norm1.register_forward_pre_hook(keep)
    loss = job.loss(step)
    keeping.remove()
    (grad,) = torch.autograd.grad(loss, inputs, retain_graph=True)

    def ask_inside(_: Tensor) -> None:
        x = torch.ones(3, requires_grad=True)
        with torch.enable_grad():
            torch.autograd.grad(x.square().sum(), x)

    inputs[0].register_hook(ask_inside)
    job.note({"gradient of the input": grad})
    job.backward(loss)
    job.optimizer.step()


def _pipelined(job: Job, step: int) -> None:
    """Two micro-batches that nobody reduces, and then a reduce outside of any backward pass."""
    job.optimizer.zero_grad()
    job.model.set_requires_gradient_sync(False)
    for micro in range(2):
        job.backward(job.loss(10 * step + micro))
    reduce_outside_of_backward(job.model)
    job.note_grads()
    job.optimizer.step()


def _other_parameters(job: Job, step: int) -> None:
    """All ranks leave out a norm of a block at every other step."""
    block = job.model.blocks[1]
    with mock.patch.dict(block._modules, {"norm2": nn.Identity()} if step % 2 else {}):
        job.take(step)


def _measured(job: Job, step: int) -> None:
    with job.handle.measuring():
        job.take(step)
    for name, errors in job.handle.errors().items():
        job.note({f"error of {name}": torch.tensor(errors["grad"] or 0.0)})


# --- ways to shard, and what comes after ``install`` ----------------------------------------------


def _tables_apart(model: Toy) -> None:
    """Groups that are entered with tokens: their reduces come at the end of the backward pass."""
    for module in (model.embed, model.position, *model.blocks, model):
        fully_shard(module, mesh=all_ranks())


def _several_modules(model: Toy) -> None:
    first, *others, last = model.blocks
    for modules in ([first, last], *others, [model.norm, model.head], model):
        fully_shard(modules, mesh=all_ranks())  # type: ignore[arg-type]


def _shared(model: Toy, order: list[int]) -> None:
    """Blocks that a pass goes through in this order."""
    shard(model, nested=False)
    model.blocks = nn.ModuleList(model.blocks[i] for i in order)


def _replicated(model: Toy, *, native: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    shard(model, nested=False, mesh=mesh if native else mesh["shard"])
    return {} if native else {"replicate_mesh": mesh["replicate"]}


def _divided(job: Job, factor: float) -> None:
    for module in (*job.model.blocks, job.model):
        module.set_gradient_divide_factor(factor)


def _hook_some(job: Job, ranks: tuple[int, ...] | None = None) -> None:
    """Hooks on some gradients of the second block and the root note what they see."""
    if ranks is not None and dist.get_rank() not in ranks:
        return

    def see(parameter: Any) -> None:
        job.note({"gradient in a hook": parameter.grad.to_local()})

    for name in ("blocks.1.qkv.weight", "blocks.1.mlp.gain", "norm.bias"):
        hook = job.model.get_parameter(name).register_post_accumulate_grad_hook(see)
        job.hooks.append(hook)


def _prune(job: Job, *, with_grads: bool) -> None:
    """Keep a third of the blocks' matrices, and the wire knows it."""
    masks = {}
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for parameter in job.model.blocks.parameters():
            if parameter.ndim == 2:
                values = parameter.to_local()
                masks[parameter] = torch.rand(values.shape, generator=generator) < 0.3
                values.masked_fill_(~masks[parameter], 0)

    def prune_again(*_: object) -> None:
        with torch.no_grad():
            for parameter, mask in masks.items():
                parameter.to_local().masked_fill_(~mask, 0)

    job.handle.set_support(masks, with_grads=with_grads)
    job.model.register_forward_pre_hook(prune_again)


def _prefetch(job: Job) -> None:
    for before, after in zip(job.model.blocks, job.model.blocks[1:], strict=False):
        after.set_modules_to_backward_prefetch([before])


def _compile(job: Job) -> None:
    for block in job.model.blocks:
        block.compile(backend="aot_eager")


LEARNED = {"weight_bits": 4, "grad_bits": 4, "levels": "learned", "level_steps": (1, 2)}
TWO_HOPS = {"reduce": "two-hop", "ranks_per_node": 2}
FOUR, ANY = (4,), (1, 2, 3, 4)
WAYS = {
    "plain": Way(ranks=ANY),
    "nested": Way(ranks=ANY, sharding={"nested": True}),
    "not resharded": Way(ranks=ANY, sharding={"reshard": False}),
    "resharded to nodes": Way(ranks=FOUR, sharding={"reshard": 2}),
    "few bits": Way(config={"weight_bits": 4, "grad_bits": 3}),
    "not coded": Way(config={"weight_bits": 32, "grad_bits": 32}),
    "learned levels": Way(config=LEARNED, num_steps=3),
    "budget": Way(config={"budget": 5.0}, num_steps=3),
    "bf16, reduced in fp32": Way(dtypes=(BF16, FP32)),
    "bf16": Way(dtypes=(BF16, BF16), late=False),
    "bf16 shards": Way(shards=BF16),
    "fp16 shards": Way(shards=torch.float16),
    "factor 1": Way(prepare=partial(_divided, factor=1.0)),
    "factor 2.5": Way(prepare=partial(_divided, factor=2.5)),
    "micro-batches": Way(step=partial(_micro_batches, synced_each=False)),
    "micro-batches synced each": Way(step=partial(_micro_batches, synced_each=True)),
    "accumulated": Way(step=_accumulated),
    "set to zero": Way(step=_set_to_zero),
    "shared block": Way(make=partial(_shared, order=[0, 1, 2, 0])),
    "shared block, twice in a row": Way(make=partial(_shared, order=[0, 1, 1, 2])),
    "tables apart": Way(make=_tables_apart),
    "several modules in a group": Way(make=_several_modules),
    "hooks": Way(prepare=_hook_some),
    "hooks on one rank": Way(prepare=partial(_hook_some, ranks=(1,))),
    "optimizer in backward": Way(prepare=optimize_inside),
    "optimizer in backward on one rank": Way(prepare=partial(optimize_inside, ranks=(1,))),
    "gradients there on one rank": Way(prepare=partial(keep_gradients, ranks=(1,))),
    "CrAM": Way(step=_cram),
    "re-computation": Way(options={"checkpointing": True}),
    # At the end of each inner backward pass nothing is under way.
    "re-computation, reentrant": Way(options={"checkpointing": True}, step=_reentrant, late=None),
    "graph kept": Way(step=partial(_graph_kept, zero_between=False)),
    "graph kept, zero between": Way(step=partial(_graph_kept, zero_between=True)),
    "autograd.grad": Way(step=_input_gradient),
    "outside of backward": Way(step=_pipelined, late=False),
    "two hops": Way(ranks=FOUR, config=TWO_HOPS),
    "two hops, hooks on one rank": Way(
        ranks=FOUR, config=TWO_HOPS, prepare=partial(_hook_some, ranks=(1,))
    ),
    "two hops, gradients there on one rank": Way(
        ranks=FOUR, config=TWO_HOPS, prepare=partial(keep_gradients, ranks=(2,))
    ),
    "replicas": Way(ranks=FOUR, make=partial(_replicated, native=True), late=False),
    "quantized replicas": Way(ranks=FOUR, make=partial(_replicated, native=False), late=False),
    "masks": Way(prepare=partial(_prune, with_grads=True)),
    "masks of weights alone": Way(prepare=partial(_prune, with_grads=False)),
    "frozen": Way(options={"frozen": True}),
    "tied and unused": Way(options={"tied": True, "unused": True}),
    "other parameters at a step": Way(step=_other_parameters, num_steps=3),
    "gathered ahead": Way(prepare=_prefetch),
    "measured": Way(step=_measured),
    "two models": Way(step=take_two_models, prepare=add_another_model),
    "compiled": Way(prepare=_compile, late=None),
}


def _late_and_waiting(name: str, gather: str) -> tuple[list[str], list[int], list[int]]:
    return late_and_waiting(WAYS[name], gather)


EVERY = {f"{name}, {ranks}": (ranks, name) for name, way in WAYS.items() for ranks in way.ranks}


# Of these, others show the same.
HEAVY = {
    *("compiled", "fp16 shards", "factor 1", "shared block", "hooks", "optimizer in backward"),
    *("graph kept", "two hops, hooks on one rank", "masks of weights alone"),
    # As "accumulated" does, and the file of two hops.
    *("micro-batches synced each", "two hops, gradients there on one rank", "two hops"),
    # In tests_distributed/simulation their numbers are those of one process; that they are late, or
    # not, the others show.
    *("few bits", "learned levels", "budget", "bf16, reduced in fp32", "micro-batches"),
    *("re-computation", "frozen", "tied and unused", "replicas", "quantized replicas"),
    # As docs/fsdp2.md's table of switches is tested.
    "factor 2.5",
}


def _chosen() -> list[tuple[str, str]]:
    """Every other way once, with as many ranks and such gathers as its turn has, and one more."""
    chosen = [
        (f"{name}, {WAYS[name].ranks[i % len(WAYS[name].ranks)]}", ("twice", "once")[i // 2 % 2])
        for i, name in enumerate(WAYS)
        if name not in HEAVY
    ]
    more = [("plain, 1", "once")]
    return list(dict.fromkeys([*chosen, *more]))


@selection("way, gather", _chosen(), EVERY, ("twice", "once"))
def test_what_comes_late_is_what_would_have_been_waited_for(
    run: Run, way: str, gather: str
) -> None:
    ranks, name = EVERY[way]
    for differs, seen, seen_waiting in run(ranks, _late_and_waiting, name, gather):
        assert differs == []
        assert not any(seen_waiting)
        assert max(seen) <= MOST
        if ranks == 1:  # FSDP2 copies, and reduces nothing
            assert not any(seen)
        elif WAYS[name].late is not None:
            assert any(seen) == WAYS[name].late
