"""One rank differs in an argument or in state: all ranks raise one sentence, and none hangs.

Each point of the tables below is something that one rank does while the others do something else.
All of them raise at the same call; that no collective is left half done, the default group shows
after each point.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

import qsdp
from qsdp.checkpoint import load, save
from qsdp.failures import CollectiveError
from tests_distributed.conftest import Run, selection
from tests_distributed.support.helpers import make_batch, make_model, shard

UP = "blocks.0.mlp.up.weight"
DOWN = "blocks.0.mlp.down.weight"
ONCE = {"gather": "once"}


class Stage:
    """What one rank has at one point: a sharded model, and the wire if the point has a config."""

    def __init__(self, point: Point, rank: int, odd: int) -> None:
        self.rank, self.odd = rank, odd
        self.model: Any = shard(make_model(**{"num_layers": 1, **point.model}))
        self.batch = make_batch(self.model, 0)
        self.handle: Any = None
        if point.config is not None:
            self.handle = qsdp.install(self.model, qsdp.QSDPConfig(**point.config))
        self.optimizer: Any = None
        self.folder = Path()

    def parameter(self, name: str) -> Any:
        """The shard of that name: what a forward pass left gathered is freed before."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return self.model.get_parameter(name)

    def forward(self) -> Tensor:
        loss: Tensor = self.model(*self.batch)
        return loss

    def train(self) -> Tensor:
        """One forward and backward pass."""
        loss = self.forward()
        torch.autograd.backward(loss)
        return loss.detach()

    def masks(self, *names: str) -> dict[nn.Parameter, Tensor]:
        """Masks that keep everything."""
        chosen = [self.parameter(name) for name in names or (UP,)]
        return {p: torch.ones_like(p.to_local(), dtype=torch.bool) for p in chosen}


Act = Callable[[Stage], object]
Says = Callable[[int, int], str]
"""Of a rank and the odd one, a pattern of what the rank says."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Something in which one rank differs."""

    there: Act
    """What the odd rank does."""
    elsewhere: Act
    """What the others do meanwhile."""
    says: Says
    before: Act = lambda stage: None
    """What all do before that."""
    config: Mapping[str, Any] | None = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


def differs(call: str, fact: str, there: str, elsewhere: str) -> Says:
    """All are at ``call``, but ``fact`` is another one on the odd rank (both patterns)."""

    def says(rank: int, odd: int) -> str:
        one, first = (there, elsewhere) if odd else (elsewhere, there)
        return (
            f"rank {odd or 1} is at {re.escape(call)} with {fact} {one}, but rank 0 with {first}: "
            "do the same on every rank"
        )

    return says


def apart(there: str, elsewhere: str) -> Says:
    """The odd rank is at another call."""

    def says(rank: int, odd: int) -> str:
        one, first = map(re.escape, (there, elsewhere) if odd else (elsewhere, there))
        return (
            f"rank {odd or 1} is at {one} while rank 0 is at {first}: make the same calls on every "
            "rank, in the same order"
        )

    return says


def mistaken(call: str, mistake: str) -> Says:
    """The odd rank says what its mistake is (a pattern), the others whose it is and where."""

    def says(rank: int, odd: int) -> str:
        if rank == odd:
            return mistake
        return f"rank {odd} cannot do what the others do at {re.escape(call)}: {mistake}"

    return says


def installs(what: str, there: str, elsewhere: str) -> Says:
    """`install` says what differs."""

    def says(rank: int, odd: int) -> str:
        one, first = (there, elsewhere) if odd else (elsewhere, there)
        ends = "give every rank the same config and meshes|build and shard the same model on .*"
        return f"rank {odd or 1} {what} {one} but rank 0 (with|has it) {first}: ({ends})"

    return says


def cannot_install(mistake: str) -> Says:
    """As `mistaken`, of `install`."""

    def says(rank: int, odd: int) -> str:
        if rank == odd:
            return mistake
        return f"rank {odd} cannot install qsdp \\({mistake}\\): give every rank the same model .*"

    return says


def both(pattern: str) -> Says:
    """All ranks say the same; ``{odd}`` is the odd rank."""
    return lambda rank, odd: pattern.format(odd=odd)


# --- install ----------------------------------------------------------------------------------


def _install(config: Any = None, **options: Any) -> Act:
    """Install on the model as it is, with this config."""

    def act(stage: Stage) -> None:
        given = qsdp.QSDPConfig(**config) if isinstance(config, dict) else config
        qsdp.install(stage.model, given, **options)

    return act


def _configured(
    there: Mapping[str, Any], what: str, one: str, other: str, **everywhere: Any
) -> Point:
    says = installs(f"installs qsdp with {what}", re.escape(one), re.escape(other))
    return Point(
        there=_install({**everywhere, **there}),
        elsewhere=_install(everywhere),
        says=says,
        config=None,
    )


def _install_anew(**options: Any) -> Act:
    """Shard another model with these options of `fully_shard`, and install."""

    def act(stage: Stage) -> None:
        qsdp.install(shard(make_model(num_layers=1), **options))

    return act


def _install_on_a_part(stage: Stage) -> None:
    qsdp.install(stage.model.blocks[0])


def _with_nodes(shape: Callable[[int], tuple[int, ...]]) -> Act:
    def act(stage: Stage) -> None:
        meshes = [init_device_mesh("cpu", each) for each in _node_shapes()]
        mine = shape(dist.get_world_size())
        qsdp.install(stage.model, node_mesh=meshes[_node_shapes().index(mine)])

    return act


def _node_shapes() -> list[tuple[int, int]]:
    ranks = dist.get_world_size()
    return [(1, ranks), (ranks, 1)]


def _launched(ranks: str, **config: Any) -> Act:
    """Install where the launcher says that it started so many ranks on this node."""

    def act(stage: Stage) -> None:
        before = os.environ.get("LOCAL_WORLD_SIZE")
        os.environ["LOCAL_WORLD_SIZE"] = ranks
        try:
            qsdp.install(stage.model, qsdp.QSDPConfig(**config))
        finally:
            del os.environ["LOCAL_WORLD_SIZE"]
            if before is not None:
                os.environ["LOCAL_WORLD_SIZE"] = before

    return act


def _remove_after_a_failure(stage: Stage) -> None:
    """Remove the wire on all ranks but the odd one: on the way of an exception no rank waits."""
    if stage.rank != stage.odd:
        try:
            raise ValueError
        except ValueError:
            stage.handle.remove()


def _reduces_unused(stage: Stage) -> None:
    stage.model.set_reduce_scatter_unused_params(True)
    qsdp.install(stage.model)


INSTALL = {
    "local_grad_bits": _configured({"local_grad_bits": 4}, "local_grad_bits", "4", "None"),
    "levels": _configured({"levels": "learned"}, "levels", "'learned'", "'uniform'", weight_bits=4),
    "level_steps": _configured(
        {"level_steps": (3,)}, "level_steps", "(3,)", "None", levels="learned", weight_bits=4
    ),
    "reduce": _configured({"reduce": "flat"}, "reduce", "'flat'", "'auto'"),
    "ranks_per_node": _configured({"ranks_per_node": 1}, "ranks_per_node", "1", "None"),
    "warmup_bits": _configured({"warmup_bits": 16}, "warmup_bits", "16", "None", warmup_steps=1),
    "budget": _configured({"budget": 4}, "budget", "4", "None"),
    "a budget with nothing to allot": Point(
        there=_install({"budget": 5, "policy": (("*", 8),)}),
        elsewhere=_install({"budget": 5}),
        says=cannot_install(r".*budget.*"),
        config=None,
    ),
    "config of a wrong type": Point(
        there=_install("8 bits"),
        elsewhere=_install(),
        says=cannot_install("config is a str; give a qsdp.QSDPConfig"),
        config=None,
    ),
    "node_mesh of a wrong type": Point(
        there=_install(node_mesh=(1, 2)),
        elsewhere=_install(),
        says=cannot_install("node_mesh is a tuple; give a DeviceMesh"),
        config=None,
    ),
    "replicate_mesh of a wrong type": Point(
        there=_install(replicate_mesh=2),
        elsewhere=_install(),
        says=cannot_install("replicate_mesh is a int; give a DeviceMesh"),
        config=None,
    ),
    "node_mesh of another shape": Point(
        there=_with_nodes(lambda ranks: (ranks, 1)),
        elsewhere=_with_nodes(lambda ranks: (1, ranks)),
        says=installs("installs qsdp with node_mesh", r"\(\d, 1\)", r"\(1, \d\)"),
        config=None,
    ),
    "LOCAL_WORLD_SIZE": Point(
        there=_launched("3"),
        elsewhere=_launched("1"),
        says=both(
            r"(rank \d cannot install qsdp \()?LOCAL_WORLD_SIZE is \[.*3.*\] on the ranks .*"
        ),
        config=None,
    ),
    "LOCAL_WORLD_SIZE that is no number": Point(
        there=_launched("two"),
        elsewhere=_launched("1"),
        says=cannot_install("LOCAL_WORLD_SIZE is 'two'.*"),
        config=None,
    ),
    "installed already": Point(
        before=_remove_after_a_failure,
        there=_install(),
        elsewhere=_install(),
        says=cannot_install(r"qsdp is installed on this \w+ already; call handle.remove\(\) first"),
    ),
    "a part of the model": Point(
        there=_install_on_a_part,
        elsewhere=_install(),
        says=both(r"rank \d does not shard .* but rank \d does \(\d+ and \d+ parameters\): .*"),
        config=None,
    ),
    "reduced in another type": Point(
        there=_install_anew(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)),
        elsewhere=_install_anew(),
        says=installs(
            "has the group of .*", "reduced in torch.bfloat16", "reduced in its own type"
        ),
        config=None,
    ),
    "gathered in another type": Point(
        there=_install_anew(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        elsewhere=_install_anew(),
        says=installs("has embed.weight", "of type torch.bfloat16", "of type torch.float32"),
        config=None,
    ),
    "offloaded": Point(
        there=_install_anew(offload_policy=CPUOffloadPolicy(pin_memory=False)),
        elsewhere=_install_anew(),
        says=cannot_install(r"\w+ uses CPUOffloadPolicy; shard it without offloading"),
        config=None,
    ),
}
if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # came with torch 2.13
    INSTALL["reduce_scatter_unused_params"] = Point(
        there=_reduces_unused,
        elsewhere=_install(),
        says=installs(
            "has the group of .*", "with reduce_scatter_unused_params", "without reduce_.*"
        ),
        config=None,
    )

# --- passes -----------------------------------------------------------------------------------

FORWARD, BACKWARD = "a forward pass", "a backward pass"


def _forward(stage: Stage) -> None:
    stage.forward()


def _train(stage: Stage) -> None:
    stage.train()


def _in_exact(stage: Stage) -> None:
    with stage.handle.exact():
        stage.forward()


def _in_no_grad(stage: Stage) -> None:
    with torch.no_grad():
        stage.forward()


def _in_no_grad_and_train(stage: Stage) -> None:
    _in_no_grad(stage)
    stage.train()


def _in_inference_mode(stage: Stage) -> None:
    with torch.inference_mode():
        stage.forward()


def _with_state(**changes: Any) -> Act:
    """Load the handle's own state with changes, and go on."""

    def act(stage: Stage) -> None:
        stage.handle.load_state_dict(stage.handle.state_dict() | changes)
        stage.forward()

    return act


def _load_other_bits(stage: Stage) -> None:
    state, rows = stage.handle.state_dict(), stage.handle.report().rows
    bits = {row.name: [3, 3] for row in rows if "bits" in row.weight}
    shapes = {row.name: list(row.shape) for row in rows}
    stage.handle.load_state_dict(state | {"parameters": shapes, "bits": bits})


def _with_other_bits(stage: Stage) -> None:
    _load_other_bits(stage)
    stage.forward()


def _with_other_levels(stage: Stage) -> None:
    state = stage.handle.state_dict()
    changed = [[*row[:3], *(each * each for each in row[3:])] for row in state["levels"]]
    stage.handle.load_state_dict(state | {"levels": changed})
    stage.forward()


def _frozen(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    stage.forward()


def _in_eval_mode(stage: Stage) -> None:
    stage.model.eval()
    stage.forward()


def _with_masks_lifted(stage: Stage) -> None:
    stage.handle.set_support(None)
    stage.forward()


def _set_masks(*names: str, **options: Any) -> Act:
    return lambda stage: stage.handle.set_support(stage.masks(*names), **options)


def _set_pruned(stage: Stage) -> None:
    """Prune the first row of every rank's shard."""
    (parameter, mask), *_ = stage.masks(UP).items()
    mask[:1] = False
    with torch.no_grad():
        parameter.to_local()[:1] = 0
    stage.handle.set_support({parameter: mask})


def _with_a_pruned_weight_set(stage: Stage) -> None:
    with torch.no_grad():
        stage.parameter(UP).to_local()[:1] = 1.0
    stage.forward()


def _forward_and_train(stage: Stage) -> None:
    loss = stage.forward()
    stage.train()
    torch.autograd.backward(loss)


def _backward_twice(stage: Stage) -> None:
    loss = stage.forward()
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)


def _train_twice(stage: Stage) -> None:
    stage.train()
    stage.train()


def _without_sync(stage: Stage) -> None:
    stage.model.set_requires_gradient_sync(False)
    stage.train()


def _unforced(stage: Stage) -> None:
    stage.model.blocks[0].mlp.set_force_sum_reduction_for_comms(False)


def _told(method: str, *args: Any, passes: int = 1) -> Act:
    """Tell FSDP2 something of the MLP alone, and train."""

    def act(stage: Stage) -> None:
        getattr(stage.model.blocks[0].mlp, method)(*args)
        for _ in range(passes):
            stage.train()

    return act


def _ahead(direction: str) -> Act:
    """Let FSDP2 gather the MLP ahead of time."""

    def act(stage: Stage) -> None:
        block = stage.model.blocks[0]
        getattr(stage.model, f"set_modules_to_{direction}_prefetch")([block, block.mlp])
        stage.train()

    return act


def _between(change: Act) -> Act:
    """Change something between a forward pass and its backward pass."""

    def act(stage: Stage) -> None:
        loss = stage.forward()
        change(stage)
        torch.autograd.backward(loss)

    return act


def _backward_in_exact(stage: Stage) -> None:
    loss = stage.forward()
    with stage.handle.exact():
        torch.autograd.backward(loss)


def _glance(stage: Stage) -> None:
    with stage.handle.exact():
        pass


def _freeze_unsharded(stage: Stage) -> None:
    stage.model.blocks[0].mlp.up.weight.requires_grad_(False)


PASSES = {
    "exact in the backward pass": Point(
        there=_backward_in_exact,
        elsewhere=_train,
        says=differs(BACKWARD, "weights", "exact", "quantized"),
    ),
    "exact in between": Point(
        before=lambda stage: stage.model.set_reshard_after_forward(False),
        there=_between(_glance),
        elsewhere=_train,
        says=differs(BACKWARD, "gathered groups", ".*", ".*"),
    ),
    "exact in between with payloads kept": Point(
        before=lambda stage: stage.model.set_reshard_after_forward(False, recurse=False),
        there=_between(_glance),
        elsewhere=_train,
        says=differs(BACKWARD, "gathered groups", ".*", ".*"),
        config=ONCE,
    ),
    "masks lifted in between": Point(
        before=_set_pruned,
        there=_between(lambda stage: stage.handle.set_support(None)),
        elsewhere=_train,
        says=differs(BACKWARD, "masks", "lifted", "of call 1 of set_support"),
    ),
    "a state loaded in between": Point(
        there=_between(lambda stage: _load(stage, seed=3)),
        elsewhere=_train,
        says=differs(BACKWARD, "the seed", "3", "0"),
    ),
    "frozen in between": Point(
        there=_between(_freeze_unsharded),
        elsewhere=_train,
        says=differs(BACKWARD, "frozen parameters", UP, "none"),
        config=ONCE,
    ),
    "what is due": Point(
        before=_train,
        there=lambda stage: (_load(stage, step=1, reduced=0), stage.forward()),
        elsewhere=_forward,
        says=differs(FORWARD, "due before it", "nothing", "bits"),
        config={"budget": 5},
    ),
    "levels that are due": Point(
        before=_train,
        there=lambda stage: (_load(stage, step=1, reduced=0), stage.forward()),
        elsewhere=_forward,
        says=differs(FORWARD, "due before it", "nothing", "levels"),
        config={"levels": "learned", "weight_bits": 4, "level_steps": (1,)},
    ),
    "exact": Point(
        there=_in_exact,
        elsewhere=_forward,
        says=differs(FORWARD, "weights", "exact", "quantized"),
    ),
    "no_grad": Point(
        there=_in_no_grad, elsewhere=_train, says=differs(FORWARD, "gradients", "off", "on")
    ),
    "inference mode": Point(
        there=_in_inference_mode,
        elsewhere=_train,
        says=differs(FORWARD, "gradients", "in inference mode", "on"),
    ),
    "an evaluation after a step": Point(
        before=_train,
        there=_in_no_grad,
        elsewhere=_train,
        says=differs(FORWARD, "gradients", "off", "on"),
    ),
    "step": Point(
        before=_train,
        there=_with_state(step=7, reduced=0),
        elsewhere=_forward,
        says=differs(FORWARD, "step", "7", "1"),
    ),
    "seed": Point(
        there=_with_state(seed=7),
        elsewhere=_forward,
        says=differs(FORWARD, "the seed", "7", "0"),
    ),
    "bits": Point(
        there=_with_other_bits,
        elsewhere=lambda stage: (stage.handle.state_dict(), stage.forward()),
        says=differs(FORWARD, "bits and levels", r"\w+", r"\w+"),
        config={"budget": 5},
    ),
    "levels": Point(
        before=_train,
        there=_with_other_levels,
        elsewhere=lambda stage: (stage.handle.state_dict(), stage.forward()),
        says=differs(FORWARD, "bits and levels", r"\w+", r"\w+"),
        config={"levels": "learned", "weight_bits": 4, "level_steps": (1,)},
    ),
    "frozen": Point(
        there=_frozen,
        elsewhere=_forward,
        says=differs(FORWARD, "frozen parameters", UP, "none"),
    ),
    "frozen and sent once": Point(
        before=_train,
        there=_frozen,
        elsewhere=_train,
        says=differs(FORWARD, "frozen parameters", UP, "none"),
        config=ONCE,
    ),
    "eval mode": Point(
        there=_in_eval_mode,
        elsewhere=_train,
        says=differs(FORWARD, "groups in eval mode", "embed.weight.*", "none"),
        config=ONCE,
    ),
    "masks lifted": Point(
        before=_set_masks(UP),
        there=_with_masks_lifted,
        elsewhere=_train,
        says=differs(FORWARD, "masks", "lifted", "of call 1 of set_support"),
    ),
    "a pruned weight that is not zero": Point(
        before=_set_pruned,
        there=_with_a_pruned_weight_set,
        elsewhere=_forward,
        says=lambda rank, odd: (
            ".*zero.*" if rank == odd else f"rank {odd} cannot send its part of the group of .*"
        ),
    ),
    "a forward pass more": Point(
        there=_forward_and_train, elsewhere=_train, says=apart(FORWARD, BACKWARD)
    ),
    "a forward pass more after a step": Point(
        before=_train,
        there=_forward_and_train,
        elsewhere=_train,
        says=apart(FORWARD, BACKWARD),
        config=ONCE,
    ),
    "no backward pass": Point(
        there=_forward_and_train, elsewhere=_train_twice, says=apart(FORWARD, BACKWARD)
    ),
    "two backward passes": Point(
        there=_backward_twice, elsewhere=_train_twice, says=apart(BACKWARD, FORWARD)
    ),
    "no gradient sync": Point(
        there=_told("set_requires_gradient_sync", False),
        elsewhere=_train,
        says=differs(BACKWARD, "groups that are not reduced", "blocks.0.mlp.*", "none"),
    ),
    "an all-gather of its own": Point(
        there=_told("set_custom_all_gather", None),
        elsewhere=_train,
        says=mistaken(FORWARD, "set_custom_all_gather was called on the group of .*"),
    ),
    "a sum that is not forced": Point(
        there=_between(_unforced),
        elsewhere=_train,
        says=mistaken(BACKWARD, r"set_force_sum_reduction_for_comms\(False\) was called on .*"),
    ),
    "kept after the forward pass": Point(
        there=_told("set_reshard_after_forward", False),
        elsewhere=_train,
        says=differs(FORWARD, "groups that stay .* for the backward", "blocks.0.mlp.*", ".*"),
    ),
    "kept after the backward pass": Point(
        there=_told("set_reshard_after_backward", False),
        elsewhere=_train,
        says=differs(FORWARD, "groups that stay .* after the backward", "blocks.0.mlp.*", "none"),
    ),
    "not gathered in the backward pass": Point(
        there=_told("set_unshard_in_backward", False),
        elsewhere=_train,
        says=differs(BACKWARD, "groups that are not gathered again", "blocks.0.mlp.*", "none"),
    ),
    "gathered ahead in the forward pass": Point(
        there=_ahead("forward"),
        elsewhere=_train,
        says=differs(FORWARD, "groups that are gathered ahead", "blocks.0.* on", "none"),
    ),
    "gathered ahead in the backward pass": Point(
        there=_ahead("backward"),
        elsewhere=_train,
        says=differs(BACKWARD, "groups that are gathered ahead", "blocks.0.* on", "none"),
    ),
}

# --- methods of the handle --------------------------------------------------------------------

SUPPORT = "handle.set_support"


def _mask_of(change: Callable[[Any, Tensor], tuple[Any, Tensor]]) -> Act:
    def act(stage: Stage) -> None:
        ((parameter, mask),) = stage.masks(UP).items()
        parameter, mask = change(parameter, mask)
        stage.handle.set_support({parameter: mask})

    return act


def _then_forward(method: str, *args: Any) -> Act:
    def act(stage: Stage) -> None:
        getattr(stage.handle, method)(*args)
        stage.forward()

    return act


def _measuring(stage: Stage) -> None:
    with stage.handle.measuring():
        stage.train()
    stage.handle.errors()


def _train_and_measure(stage: Stage) -> None:
    stage.train()
    stage.handle.errors()


def _asks_for_errors(change: Act) -> Act:
    """Change something, and ask for the errors."""

    def act(stage: Stage) -> None:
        change(stage)
        stage.handle.errors()

    return act


ERRORS = "handle.errors"
LEARNED = {"levels": "learned", "weight_bits": 4}

HANDLE = {
    "masks on one rank alone": Point(
        there=_set_masks(UP),
        elsewhere=_then_forward("set_support", None),
        says=apart(SUPPORT, FORWARD),
    ),
    "masks of nothing on one rank": Point(
        there=_then_forward("set_support", {}),
        elsewhere=_set_masks(UP),
        says=apart(FORWARD, SUPPORT),
    ),
    "masks of other parameters": Point(
        there=_set_masks(DOWN),
        elsewhere=_set_masks(UP),
        says=differs(SUPPORT, "masks of", DOWN, UP),
    ),
    "masks of more parameters": Point(
        there=_set_masks(DOWN, UP),
        elsewhere=_set_masks(UP),
        says=differs(SUPPORT, "masks of", DOWN, "1 others"),
    ),
    "with_grads": Point(
        there=_set_masks(UP, with_grads=False),
        elsewhere=_set_masks(UP),
        says=differs(SUPPORT, "with_grads", "False", "True"),
    ),
    "a mask of another shape": Point(
        there=_mask_of(lambda p, mask: (p, mask[:, 1:])),
        elsewhere=_set_masks(UP),
        says=mistaken(SUPPORT, r"a mask has shape \(\d, 9\), and the local part .*"),
    ),
    "a mask of another type": Point(
        there=_mask_of(lambda p, mask: (p, mask.float())),
        elsewhere=_set_masks(UP),
        says=mistaken(SUPPORT, r"a mask is a Tensor of torch.float32; give a bool tensor .*"),
    ),
    "a mask of another model's parameter": Point(
        there=_mask_of(lambda p, mask: (nn.Parameter(p.detach().clone()), mask)),
        elsewhere=_set_masks(UP),
        says=mistaken(SUPPORT, "a mask is given for a tensor of shape .* FSDP2 does not shard .*"),
    ),
    "measuring": Point(
        there=_measuring,
        elsewhere=_train_and_measure,
        says=differs("handle.errors", "measured gradients", "True", "False"),
    ),
    "errors": Point(
        there=_then_forward("errors"), elsewhere=_forward, says=apart("handle.errors", FORWARD)
    ),
    "errors in a step": Point(
        before=_train,
        there=_then_forward("errors"),
        elsewhere=_train,
        says=apart("handle.errors", FORWARD),
        config=LEARNED,
    ),
    "errors at another step": Point(
        before=_train,
        there=_asks_for_errors(lambda stage: _load(stage, step=4, reduced=0)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "step", "4", "1"),
    ),
    "errors of other bits": Point(
        there=_asks_for_errors(_load_other_bits),
        elsewhere=_asks_for_errors(lambda stage: stage.handle.state_dict()),
        says=differs(ERRORS, "bits and levels", r"\w+", r"\w+"),
        config={"budget": 5},
    ),
    "errors where bits are due": Point(
        before=_train,
        there=_asks_for_errors(lambda stage: _load(stage, step=1, reduced=0)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "due before it", "nothing", "bits"),
        config={"budget": 5},
    ),
    "errors without masks": Point(
        before=_set_masks(UP),
        there=_asks_for_errors(lambda stage: stage.handle.set_support(None)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "masks", "lifted", "of call 1 of set_support"),
    ),
    "errors of frozen parameters": Point(
        there=_asks_for_errors(lambda stage: stage.parameter(UP).requires_grad_(False)),
        elsewhere=_then_forward("errors"),
        says=differs(ERRORS, "frozen parameters", UP, "none"),
        config=ONCE,
    ),
    "state_dict": Point(
        there=_then_forward("state_dict"),
        elsewhere=_forward,
        says=apart("handle.state_dict", FORWARD),
        config=LEARNED,
    ),
    "state_dict with a budget": Point(
        before=_train,
        there=_then_forward("state_dict"),
        elsewhere=_then_forward("errors"),
        says=apart("handle.state_dict", "handle.errors"),
        config={"budget": 5},
    ),
    "state_dict at another step": Point(
        before=_train,
        there=lambda stage: (_load(stage, step=4, reduced=0), stage.handle.state_dict()),
        elsewhere=_then_forward("state_dict"),
        says=differs("handle.state_dict", "step", "4", "1"),
        config={"budget": 5},
    ),
    "remove": Point(
        there=_then_forward("remove"), elsewhere=_forward, says=apart("handle.remove", FORWARD)
    ),
    "remove before errors": Point(
        there=_then_forward("remove"),
        elsewhere=_then_forward("errors"),
        says=apart("handle.remove", "handle.errors"),
    ),
    "remove before masks": Point(
        there=_then_forward("remove"),
        elsewhere=_set_masks(UP),
        says=apart("handle.remove", SUPPORT),
    ),
}


def _load(stage: Stage, **changes: Any) -> None:
    state = stage.handle._wire.clock.state_dict() | {"request": {}, "bits": {}, "levels": []}
    stage.handle.load_state_dict(state | changes)


# --- optimizers -------------------------------------------------------------------------------


def _made(name: str, base: Any = torch.optim.AdamW, lr: float = 0.1, **options: Any) -> Act:
    """Make that optimizer over ``base``."""

    def act(stage: Stage) -> None:
        parameters = list(stage.model.parameters())
        stage.optimizer = getattr(qsdp, name)(stage.model, base(parameters, lr=lr), **options)

    return act


def _argument(name: str, argument: str, there: Any, elsewhere: Any, **common: Any) -> Point:
    """That argument of the constructor is another one."""
    one, other = (re.escape(repr(value)) for value in (there, elsewhere))
    return Point(
        there=_made(name, **common | {argument: there}),
        elsewhere=_made(name, **common | {argument: elsewhere}),
        says=differs(f"qsdp.{name}", argument, one, other),
        config=None,
    )


def _bad(name: str, argument: str, there: Any, mistake: str, **common: Any) -> Point:
    """That argument is one that cannot be."""
    return Point(
        there=_made(name, **common | {argument: there}),
        elsewhere=_made(name, **common),
        says=mistaken(f"qsdp.{name}", mistake),
        config=None,
    )


def _base(name: str, there: Mapping[str, Any], one: str, **common: Any) -> Point:
    """The base optimizer is another one."""
    return Point(
        there=_made(name, **{**common, **there}),
        elsewhere=_made(name, **common),
        says=differs(f"qsdp.{name}", "base_optimizer", one, "AdamW .*'lr': 0.1.*"),
        config=None,
    )


def _lacking(stage: Stage) -> None:
    """A base optimizer that has a norm less than the others'."""
    parameters = [p for name, p in stage.model.named_parameters() if name != "norm.weight"]
    qsdp.CrAM(stage.model, torch.optim.AdamW(parameters, lr=0.1))


def _frozen_and_made(name: str, **options: Any) -> Act:
    def act(stage: Stage) -> None:
        stage.parameter(UP).requires_grad_(False)
        _made(name, **options)(stage)

    return act


PHASES = qsdp.ACDCSchedule(steps=8, warmup=1, phase=2, last_dense=1, last_sparse=1)
OTHER_PHASES = qsdp.ACDCSchedule(steps=8, warmup=2, phase=2, last_dense=1, last_sparse=1)
GROWTH = qsdp.GMPSchedule(steps=9, sparsity=0.5, initial=0.1, start=1, every=1, end=5)
OTHER_GROWTH = qsdp.GMPSchedule(steps=9, sparsity=0.6, initial=0.1, start=1, every=1, end=5)
MLP = ["*.mlp.*.weight"]
OPTIONS: dict[str, dict[str, Any]] = {
    "CrAM": {},
    "SAM": {},
    "ACDC": {"schedule": PHASES},
    "GMP": {"schedule": GROWTH},
}

OPTIMIZERS = {
    "sparsity of CrAM": _argument("CrAM", "sparsity", 0.3, [0.5, 0.7]),
    "rho of CrAM": _argument("CrAM", "rho", 0.1, 0.05),
    "plus": _argument("CrAM", "plus", False, True),
    "normalize": _argument("CrAM", "normalize", True, False),
    "sparse_grad": _argument("CrAM", "sparse_grad", False, True),
    "max_norm of CrAM": _argument("CrAM", "max_norm", 1.0, None),
    "prunable of CrAM": _argument("CrAM", "prunable", MLP, None),
    "seed of CrAM": _argument("CrAM", "seed", 3, 0),
    "rho of SAM": _argument("SAM", "rho", 0.1, 0.05),
    "max_norm of SAM": _argument("SAM", "max_norm", 1.0, None),
    "schedule of ACDC": _argument("ACDC", "schedule", OTHER_PHASES, PHASES),
    "steps of ACDC": _argument("ACDC", "schedule", 40, PHASES),
    "target of ACDC": _argument("ACDC", "target", "2:4", 0.9, schedule=PHASES, prunable=MLP[:0]),
    "max_norm of ACDC": _argument("ACDC", "max_norm", 2.0, 1.0, schedule=PHASES),
    "prunable of ACDC": _argument("ACDC", "prunable", MLP, None, schedule=PHASES),
    "schedule of GMP": _argument("GMP", "schedule", OTHER_GROWTH, GROWTH),
    "scope of GMP": _argument("GMP", "scope", "layer", "global", schedule=GROWTH),
    "max_norm of GMP": _argument("GMP", "max_norm", 2.0, None, schedule=GROWTH),
    "prunable of GMP": _argument("GMP", "prunable", MLP, None, schedule=GROWTH),
    "bad sparsity": _bad("CrAM", "sparsity", 1.5, "sparsity is 1.5; choose .*"),
    "no sparsity": _bad("CrAM", "sparsity", (), "sparsity is empty; .*"),
    "bad rho": _bad("CrAM", "rho", -1.0, "rho is -1.0; choose .*"),
    "bad rho of SAM": _bad("SAM", "rho", float("nan"), "rho is nan; choose .*"),
    "bad max_norm of SAM": _bad("SAM", "max_norm", 0, "max_norm is 0; choose .*"),
    "bad pattern": _bad("CrAM", "prunable", ["no.such"], "the prunable pattern 'no.such' .*"),
    "bad schedule of ACDC": _bad(
        "ACDC", "schedule", "often", "the schedule is .*", schedule=PHASES
    ),
    "bad target of ACDC": _bad("ACDC", "target", "4bit", "a mask cannot .*", schedule=PHASES),
    "bad schedule of GMP": _bad("GMP", "schedule", 9, "the schedule is 9; .*", schedule=GROWTH),
    "bad scope of GMP": _bad("GMP", "scope", "row", "scope is 'row'; .*", schedule=GROWTH),
    "bad max_norm of GMP": _bad("GMP", "max_norm", -1, "max_norm is -1; .*", schedule=GROWTH),
    "lr": _base("CrAM", {"lr": 0.2}, "AdamW .*'lr': 0.2.*"),
    "base of SAM": _base("SAM", {"base": torch.optim.SGD}, "SGD .*"),
    "base of ACDC": _base("ACDC", {"base": torch.optim.SGD}, "SGD .*", schedule=PHASES),
    "lr of GMP": _base("GMP", {"lr": 0.2}, "AdamW .*'lr': 0.2.*", schedule=GROWTH),
    "bad base": _bad("CrAM", "base", torch.optim.LBFGS, "the base optimizer is LBFGS; .*"),
    "a parameter less": Point(
        there=_lacking,
        elsewhere=_made("CrAM"),
        says=differs("qsdp.CrAM", "parameters of the optimizer", r"\d+", r"\d+"),
        config=None,
    ),
    "a frozen parameter": Point(
        there=_frozen_and_made("ACDC", schedule=PHASES),
        elsewhere=_made("ACDC", schedule=PHASES),
        says=differs("qsdp.ACDC", "prunable parameters", r"\d others", UP),
        config=None,
    ),
    "another class": Point(
        there=_made("SAM"),
        elsewhere=_made("CrAM"),
        says=apart("qsdp.SAM", "qsdp.CrAM"),
        config=None,
    ),
    "not made": Point(there=_forward, elsewhere=_made("CrAM"), says=apart(FORWARD, "qsdp.CrAM")),
}


def _step(stage: Stage) -> None:
    """A step with a closure."""
    stage.optimizer.step(stage.train)


def _step_alone(stage: Stage) -> None:
    stage.optimizer.step()


def _numbered(key: str) -> Act:
    """Load a state of another step, and step."""

    def act(stage: Stage) -> None:
        state = stage.optimizer.state_dict()
        for group in state["param_groups"]:
            group[key] = 3
        stage.optimizer.load_state_dict(state)
        _step(stage)

    return act


def _frozen_and_step(stage: Stage) -> None:
    stage.parameter("norm.weight").requires_grad_(False)
    _step(stage)


def _kept_and_step(stage: Stage) -> None:
    stage.model.set_reshard_after_backward(False)
    _step(stage)


def _closure_fails(stage: Stage) -> None:
    """The closure fails before its first pass, and the step is tried again."""

    def fails() -> None:
        raise ZeroDivisionError

    try:
        stage.optimizer.step(fails)
    except ZeroDivisionError:
        _step(stage)


def _steps(name: str) -> dict[str, Point]:
    """Of each class."""
    call = f"{name}.step"
    key = "masked_step" if name in ("ACDC", "GMP") else "cram_step"

    def before(stage: Stage) -> None:
        _made(name, **OPTIONS[name])(stage)
        _step(stage)

    def point(there: Act, elsewhere: Act, says: Says) -> Point:
        return Point(before=before, there=there, elsewhere=elsewhere, says=says)

    return {
        f"closure of {name}": point(_step_alone, _step, differs(call, "closure", "False", "True")),
        f"step of {name}": point(_numbered(key), _step, differs(call, "step", "3", "1")),
        f"frozen under {name}": point(
            _frozen_and_step, _step, differs(call, "trained parameters", r"\d+", r"\d+")
        ),
        f"kept under {name}": point(
            _kept_and_step, _step, mistaken(call, f"{name} edits the weights .*")
        ),
        f"no step of {name}": point(_train, _step, apart(FORWARD, call)),
        f"a step more of {name}": point(_step, _train, apart(call, FORWARD)),
        f"a failure in a step of {name}": point(_closure_fails, _step, apart(call, FORWARD)),
    }


def _with_support(stage: Stage) -> None:
    stage.optimizer.share_support(stage.handle.set_support)
    _step(stage)
    stage.forward()


def _at_another_target(stage: Stage) -> None:
    stage.optimizer.targets = (qsdp.Compression(pattern=(1, 5)),)
    _step(stage)


def _step_and_forward(stage: Stage) -> None:
    _step(stage)
    stage.forward()


def _at_rate(lr: float) -> Act:
    def act(stage: Stage) -> None:
        stage.train()
        for group in stage.optimizer.param_groups:
            group["lr"] = lr
        stage.optimizer.step()
        stage.forward()

    return act


def _with_state_of_its_own(stage: Stage) -> None:
    for parameter in stage.optimizer.parameters():
        stage.optimizer.state[parameter]["of its own"] = 1
    _step(stage)


STEPS = {
    **_steps("CrAM"),
    **_steps("SAM"),
    **_steps("ACDC"),
    **_steps("GMP"),
    "target of CrAM": Point(
        before=_made("CrAM", sparsity=0.5),
        there=_at_another_target,
        elsewhere=_step,
        says=differs("CrAM.step", "target", "1:5", "0.5"),
    ),
    "support of CrAM": Point(
        before=_made("CrAM"),
        there=_with_support,
        elsewhere=_step_and_forward,
        says=apart(SUPPORT, FORWARD),
    ),
    "support of ACDC": Point(
        before=_made("ACDC", schedule=PHASES),
        there=_with_support,
        elsewhere=_step_and_forward,
        says=apart(SUPPORT, FORWARD),
    ),
    "state of ACDC": Point(
        before=_made("ACDC", schedule=PHASES),
        there=_with_state_of_its_own,
        elsewhere=_step,
        says=differs("ACDC.step", "state", "True", "False"),
    ),
    "a learning rate of 0": Point(
        before=_made("GMP", schedule=GROWTH),
        there=_at_rate(0.0),
        elsewhere=_at_rate(0.1),
        says=differs("GMP.step", "learning rates of 0", "True", "False"),
    ),
}

# --- clipping, compression --------------------------------------------------------------------

CLIP, COMPRESSED = "qsdp.clip_grad_norm_", "qsdp.compressed"


def _clip(max_norm: float) -> Act:
    return lambda stage: qsdp.clip_grad_norm_(stage.model.parameters(), max_norm)


def _clip_fewer(stage: Stage) -> None:
    qsdp.clip_grad_norm_([stage.parameter(UP)], 1.0)


def _clip_nothing(stage: Stage) -> None:
    qsdp.clip_grad_norm_([], 1.0)
    stage.forward()


def _frozen_and_clip(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    _clip(1.0)(stage)


def _compressed(*args: Any, part: bool = False) -> Act:
    def act(stage: Stage) -> None:
        model = stage.model.blocks[0] if part else stage.model
        with qsdp.compressed(model, *args), torch.no_grad():
            stage.forward()

    return act


WHOLE = {
    "max_norm": Point(
        before=_train,
        there=_clip(2.0),
        elsewhere=_clip(1.0),
        says=differs(CLIP, "max_norm", "2.0", "1.0"),
    ),
    "bad max_norm": Point(
        before=_train,
        there=_clip(-1.0),
        elsewhere=_clip(1.0),
        says=mistaken(CLIP, "max_norm is -1.0; choose a number above 0"),
    ),
    "fewer parameters": Point(
        before=_train,
        there=_clip_fewer,
        elsewhere=_clip(1.0),
        says=differs(CLIP, "trained parameters", "1", r"\d+"),
    ),
    "no parameters": Point(
        before=_train,
        there=_clip_nothing,
        elsewhere=_clip(1.0),
        says=apart(FORWARD, CLIP),
    ),
    "a parameter that is frozen": Point(
        before=_train,
        there=_frozen_and_clip,
        elsewhere=_clip(1.0),
        says=differs(CLIP, "trained parameters", r"\d+", r"\d+"),
    ),
    "not clipped": Point(
        before=_train, there=_forward, elsewhere=_clip(1.0), says=apart(FORWARD, CLIP)
    ),
    "target": Point(
        there=_compressed(0.5),
        elsewhere=_compressed("0.5+layer"),
        says=differs(COMPRESSED, "target", "0.5", r"0.5\+layer"),
    ),
    "patterns": Point(
        there=_compressed(0.5, MLP),
        elsewhere=_compressed(0.5),
        says=differs(COMPRESSED, "prunable parameters", r"\d others", ".*qkv.*"),
    ),
    "bad target": Point(
        there=_compressed("many"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "the target 'many' has the term 'many'; .*"),
    ),
    "bad patterns": Point(
        there=_compressed(0.5, "*"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "the prunable patterns are the text .*"),
    ),
    "a target that does not fit": Point(
        there=_compressed("0.5+block3"),
        elsewhere=_compressed(0.5),
        says=mistaken(COMPRESSED, "blocks.* cut into groups of 3; .*"),
    ),
    "not compressed": Point(
        there=_forward, elsewhere=_compressed(0.5), says=apart(FORWARD, COMPRESSED)
    ),
    "compressed without the wire": Point(
        there=_compressed(0.5),
        elsewhere=_clip(1.0),
        says=apart(COMPRESSED, CLIP),
        config=None,
    ),
}

TABLES = {
    "install": INSTALL,
    "passes": PASSES,
    "handle": HANDLE,
    "optimizers": OPTIMIZERS,
    "steps": STEPS,
    "whole": WHOLE,
}


def go_through(table: str, odd: int, names: list[str] | None = None) -> dict[str, str]:
    """What this rank says at each point."""
    odd %= dist.get_world_size()
    points = TABLES[table]
    return {name: _say(points[name], odd) for name in names or points}


def _say(point: Point, odd: int, kind: type[Stage] = Stage) -> str:
    rank = dist.get_rank()
    stage = kind(point, rank, odd)
    point.before(stage)
    said = "nothing"
    try:
        (point.there if rank == odd else point.elsewhere)(stage)
    except (RuntimeError, ValueError) as error:
        said = f"a lost rank: {error}" if isinstance(error, CollectiveError) else str(error)
    # All have left the same collectives, and none is half done.
    present = torch.ones(())
    dist.all_reduce(present)
    assert present == dist.get_world_size()
    return said


@pytest.mark.parametrize("table", TABLES)
@selection("ranks,odd", [(3, -1)], [2, 3], [0, -1])
def test_when_one_rank_differs_all_raise_and_say_how(
    run: Run, table: str, ranks: int, odd: int
) -> None:
    everyone = run(ranks, go_through, table, odd)
    for name, point in TABLES[table].items():
        for rank, said in enumerate(each[name] for each in everyone):
            assert re.fullmatch(point.says(rank, odd % ranks), said), f"{name}: {said}"


# --- replicas ---------------------------------------------------------------------------------

SHARED = r"rank (\d) cannot do what the others do at a backward pass: "


class ReplicaStage(Stage):
    """As `Stage`, on two replicas of two ranks each, whose average is qsdp's."""

    def __init__(self, point: Point, rank: int, odd: int) -> None:
        self.rank, self.odd = rank, odd
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.model = shard(make_model(num_layers=1, **point.model), mesh=self.mesh["shard"])
        self.batch = make_batch(self.model, 0)
        self.handle = qsdp.install(self.model, replicate_mesh=self.mesh["replicate"])


def _train_frozen(stage: Stage) -> None:
    stage.parameter(UP).requires_grad_(False)
    stage.train()


def _train_exact(stage: Stage) -> None:
    with stage.handle.exact():
        stage.train()


def _at_step(stage: Stage) -> None:
    stage.handle.load_state_dict(stage.handle.state_dict() | {"step": 5})
    stage.train()


def _lift_and_train(stage: Stage) -> None:
    stage.handle.set_support(None)
    stage.train()


def _train_unused(stage: Stage) -> None:
    """A pass in which a norm gets no gradient."""
    model = stage.model
    norm, model.norm = model.norm, nn.Identity()
    try:
        stage.train()
    finally:
        model.norm = norm


# What some do while the others train, what all do before, and what differs: in a forward pass of
# one replica, and between the two.
REPLICAS: dict[str, tuple[Act, Act, str, str]] = {
    "frozen": (_train_frozen, _train, f"frozen parameters (none|{UP})", "the same"),
    "exact": (_train_exact, _train, "weights (exact|quantized)", r"step \d"),
    "step": (_at_step, _train, r"step \d", "the same"),
    "masks": (_lift_and_train, _set_pruned, "masks (lifted|of call 1 of set_support)", "the same"),
    "unused": (_train_unused, lambda stage: None, "", "unused"),
    "unused later": (_train_unused, _train, "", "unused"),
    "evaluated": (_in_no_grad_and_train, _train, "gradients (on|off)", ""),
}


def go_through_replicas(odds: list[int]) -> dict[str, str]:
    """What this rank says at each point, where the ranks ``odds`` differ."""
    rank = dist.get_rank()
    said = {}
    for name, (there, before, *_) in REPLICAS.items():
        point = Point(there=there, elsewhere=_train, says=both(""), before=before)
        said[name] = _say(point, rank if rank in odds else -1, ReplicaStage)
    return said


def ask_for_errors(odds: list[int]) -> str:
    """Ranks ``odds`` ask for the errors while the others train."""
    rank = dist.get_rank()
    there = lambda stage: stage.handle.errors()  # noqa: E731
    point = Point(there=there, elsewhere=_train, says=both(""), before=_train)
    return _say(point, rank if rank in odds else -1, ReplicaStage)


@pytest.mark.parametrize("odds", [[0], [3], [2, 3]])
def test_another_call_than_training_reaches_the_replicas(run: Run, odds: list[int]) -> None:
    calls = r"(handle\.errors|a (for|back)ward pass)"
    for said in run(4, ask_for_errors, odds):
        told = rf"({SHARED})?rank \d is at {calls} while rank \d is at {calls}: .*"
        assert re.fullmatch(told, said), said


@pytest.mark.parametrize(
    "odds",
    [
        *([3], [0, 1], [0, 1, 2, 3]),
        *(pytest.param(odds, marks=pytest.mark.heavy) for odds in ([0], [2, 3])),
    ],
)
def test_when_one_rank_or_replica_differs_all_raise_but_not_when_all_do(
    run: Run, odds: list[int]
) -> None:
    everyone = run(4, go_through_replicas, odds)
    for name, (*_, alone, apart) in REPLICAS.items():
        between = alone if apart == "the same" else apart
        for said in (each[name] for each in everyone):
            if len(odds) == 4 or (len(odds) == 2 and not between):
                assert said == "nothing", name
            elif apart == "unused":
                missing = (
                    r"rank \d has no gradient of norm.weight and norm.bias to reduce, but rank"
                )
                assert re.fullmatch(f"{missing}.*", said), f"{name}: {said}"
            elif len(odds) == 2:
                here = rf"rank \d is at a backward pass with {between}, but rank \d with .*"
                assert re.fullmatch(here, said), f"{name}: {said}"
            else:
                here = rf"({SHARED})?rank \d is at a forward pass with {alone}, but rank \d with .*"
                assert re.fullmatch(here, said), f"{name}: {said}"


@pytest.mark.parametrize("odds", [[0], [3], [2, 3]])
def test_with_fsdps_own_average_the_other_replica_hears_too(run: Run, odds: list[int]) -> None:
    for rank, said in enumerate(run(4, _evaluate_on_own_average, odds)):
        alone = rank // 2 == odds[0] // 2
        here = r"rank \d is at a forward pass with gradients (on|off), but rank \d with .*"
        assert re.fullmatch("nothing" if len(odds) == 2 else ("" if alone else SHARED) + here, said)


def _evaluate_on_own_average(odds: list[int]) -> str:
    rank = dist.get_rank()
    act = _in_no_grad_and_train
    point = Point(there=act, elsewhere=_train, says=both(""), before=_train)
    return _say(point, rank if rank in odds else -1, HybridStage)


class HybridStage(Stage):
    """As `Stage`, on two replicas of two ranks each, whose average is FSDP2's."""

    def __init__(self, point: Point, rank: int, odd: int) -> None:
        self.rank, self.odd = rank, odd
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.model = shard(make_model(num_layers=1), mesh=mesh)
        self.batch = make_batch(self.model, 0)
        self.handle = qsdp.install(self.model)


# --- checkpoints ------------------------------------------------------------------------------


def _save(step: int, has_optimizer: bool = True, folder: str = "", **options: Any) -> Act:
    def act(stage: Stage) -> None:
        optimizer = stage.optimizer if has_optimizer else None
        save(stage.folder / folder, step, stage.model, optimizer, {}, **options)

    return act


def _load_step(step: int) -> Act:
    return lambda stage: load(stage.folder / f"step-{step:08d}", stage.model, stage.optimizer)


CHECKPOINTS = {
    "step": (_save(4), _save(3), differs("checkpoint.save", "step", "4", "3")),
    "folder": (_save(3, folder="b"), _save(3), differs("checkpoint.save", "folder", r".*b", ".*")),
    "keep": (_save(3, keep=9), _save(3), differs("checkpoint.save", "keep", "9", "2")),
    "optimizer": (
        _save(3, False),
        _save(3),
        differs("checkpoint.save", "optimizer", "False", "True"),
    ),
    "loaded step": (
        _load_step(1),
        _load_step(2),
        differs("checkpoint.load", "folder", ".*1", ".*2"),
    ),
    "missing": (_load_step(9), _load_step(2), differs("checkpoint.load", "folder", ".*9", ".*2")),
    "loaded while saved": (_load_step(1), _save(3), apart("checkpoint.load", "checkpoint.save")),
    "not saved": (_forward, _save(3), apart(FORWARD, "checkpoint.save")),
}


def go_through_checkpoints(folder: Path, odd: int) -> dict[str, str]:
    """What this rank says at each point."""
    odd %= dist.get_world_size()

    def before(stage: Stage) -> None:
        _made("CrAM")(stage)
        stage.folder = folder
        if not folder.exists():
            dist.barrier()
            _save(1)(stage)
            _save(2)(stage)

    return {
        name: _say(Point(there=there, elsewhere=elsewhere, says=says, before=before), odd)
        for name, (there, elsewhere, says) in CHECKPOINTS.items()
    }


@selection("ranks,odd", [(2, -1), (3, 0)], [2, 3], [0, -1])
def test_when_one_rank_differs_no_checkpoint_is_touched(
    run: Run, tmp_path: Path, ranks: int, odd: int
) -> None:
    everyone = run(ranks, go_through_checkpoints, tmp_path / "checkpoints", odd)
    for name, (*_, says) in CHECKPOINTS.items():
        for rank, said in enumerate(each[name] for each in everyone):
            assert re.fullmatch(says(rank, odd % ranks), said), f"{name}: {said}"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# --- what may differ --------------------------------------------------------------------------


def _edit_frozen_on_one_rank(gather: str, odd: int) -> list[Tensor]:
    """Losses before and after one rank edits its shard of a frozen weight, and after a step."""
    odd %= dist.get_world_size()
    model: Any = make_model(num_layers=1)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    handle = qsdp.install(shard(model), qsdp.QSDPConfig(gather=gather, weight_bits=32))
    batch = make_batch(model, 0, rank=0)
    losses = []
    for is_edited in (False, True, False):
        if is_edited and dist.get_rank() == odd:
            model.blocks[0].mlp.reshard()
            with torch.no_grad():
                model.get_parameter(UP).to_local().add_(1.0)
        loss = model(*batch)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        model.zero_grad()
    handle.remove()
    return losses


@selection("ranks,odd", [(2, 0), (3, -1)], [2, 3], [0, -1])
def test_all_ranks_see_what_one_rank_edits(run: Run, ranks: int, odd: int) -> None:
    (expected, *_), (found, *others) = (
        run(ranks, _edit_frozen_on_one_rank, gather, odd) for gather in ("twice", "once")
    )
    assert expected[1] != expected[0]
    for losses in (found, *others):
        assert losses == expected


def _without_gradients(odd: int) -> dict[str, Any]:
    """Norms where one rank has no gradient at all, and the number of its steps."""
    odd %= dist.get_world_size()
    found: dict[str, Any] = {}
    for name in OPTIONS:
        stage = Stage(STEPS[f"step of {name}"], dist.get_rank(), odd)
        _made(name, **OPTIONS[name])(stage)

        def closure(stage: Stage = stage) -> Tensor:
            loss = stage.train()
            if stage.rank == odd:
                stage.optimizer.zero_grad()
            return loss

        for _ in range(2):
            stage.optimizer.step(closure)
        found[name] = stage.optimizer.last_grad_norm, stage.optimizer.num_steps
        stage.optimizer.zero_grad()
        closure()
        found[f"clipped after {name}"] = qsdp.clip_grad_norm_(stage.model.parameters(), 1.0)
        stage.forward()
    return found


@selection("ranks,odd", [(2, -1), (3, 0)], [2, 3], [0, -1])
def test_a_rank_may_have_no_gradient(run: Run, ranks: int, odd: int) -> None:
    first, *others = run(ranks, _without_gradients, odd)
    assert all(norm and steps == 2 for norm, steps in map(first.get, OPTIONS))
    assert others == [first] * (ranks - 1)


def optimizers_with_objects() -> bool:
    """Two optimizers whose defaults hold what is another object on every rank."""
    model = shard(make_model())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.defaults["hook"] = object()
    return isinstance(qsdp.CrAM(model, base), qsdp.CrAM)


def test_objects_of_each_rank_are_no_difference(run: Run) -> None:
    assert run(2, optimizers_with_objects) == [True, True]
