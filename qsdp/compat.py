"""The only file that touches private names of torch, for torch 2.11 to 2.14.

Nothing is patched, and but for `set_comms`, `set_put_off` and `abandon_pass` everything only reads.
What is read is what the public seam (`FSDPModule.set_custom_all_gather`,
`set_custom_reduce_scatter`) does not say: which parameters a group holds and in which order, and
the objects to restore when the hooks are removed.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class ShardedParameter:
    """What FSDP2's own tables say of one parameter of a group."""

    parameter: nn.Parameter
    """The sharded DTensor that `module.parameters()` shows while the group is sharded."""
    dtype: torch.dtype
    """Element type in the all-gather buffer, `param_dtype` applied."""
    shard_dim: int
    padded_numel: int
    """Values that every rank's slice takes in the flat buffer."""
    is_extension: bool
    """Whether the tensor brings its own all-gather (fsdp_pre_all_gather), as float8 does."""
    mesh_ndim: int
    """Dimensions of its DTensor mesh: more than the group's under tensor parallelism."""


@dataclass(frozen=True)
class ParameterGroup:
    """One `fully_shard` call: the parameters that travel together."""

    module: FSDPModule
    """The first of its modules: setters on it act on the group."""
    modules: tuple[nn.Module, ...]
    state: Any
    num_groups: int
    """More than one with per-parameter meshes."""

    @property
    def _group(self) -> Any:
        return _param_groups(self.state)[0]

    def parameters(self) -> list[ShardedParameter]:
        """The group's parameters in buffer order, while it is sharded."""
        pairs = [(_registered(p), p) for p in self._group.fsdp_params]
        return [
            ShardedParameter(
                parameter=parameter,
                dtype=_wire_dtype(parameter.dtype, self._group.mp_policy.param_dtype),
                shard_dim=p.fsdp_placement.dim,
                padded_numel=p.padded_sharded_param_size.numel(),
                is_extension=hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather"),
                mesh_ndim=parameter.device_mesh.ndim,
            )
            for parameter, p in pairs
        ]

    def sharded_parameters(self) -> list[nn.Parameter]:
        """What optimizers hold, in buffer order."""
        return [p.sharded_param for p in self._group.fsdp_params]

    def unsharded_parameters(self) -> list[Tensor | None]:
        """The tensors that autograd sees, in buffer order; None before the first gather."""
        return [getattr(p, "_unsharded_param", None) for p in self._group.fsdp_params]

    def make_buffers(self) -> None:
        """Gather once outside inference mode, if nothing was gathered yet: FSDP2 keeps the buffers
        of its first gather, and those of inference mode cannot be written in training."""
        if None in self.unsharded_parameters():
            with torch.inference_mode(False), torch.no_grad():
                self.module.unshard()
                self.module.reshard()

    @property
    def is_gathered(self) -> bool:
        """Whether the whole weights are in memory: a forward pass would not gather them."""
        is_unsharded: bool = self._group.is_unsharded
        return is_unsharded

    def pending_gradients(self) -> set[int]:
        """Places of the parameters with a gradient that was not reduced yet."""
        return {
            i
            for i, p in enumerate(self._group.fsdp_params)
            if p.unsharded_accumulated_grad is not None
            or getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None
        }

    def parameters_with_hooks(self) -> set[int]:
        """Places of the parameters with hooks that FSDP2 calls when it has their gradients."""
        parameters = enumerate(self.sharded_parameters())
        return {i for i, p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)}

    @property
    def has_gradients(self) -> bool:
        """Whether any of its shards has a gradient, of an earlier reduce of whatever group."""
        return any(p.sharded_param.grad is not None for p in self._group.fsdp_params)

    @property
    def shows_gradients(self) -> bool:
        """Whether it has hooks that FSDP2 calls with what a reduce has brought."""
        return self._group._all_reduce_hook is not None or bool(self.parameters_with_hooks())

    @property
    def reduces_apart(self) -> bool:
        """Whether gradients have a process group of their own (torch 2.13)."""
        return getattr(self._group.mesh_info, "reduce_scatter_process_group", None) is not None

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The process group of the all-gather; None when the mesh has no shard axis."""
        return getattr(self._group.mesh_info, "shard_process_group", None)

    @property
    def mesh(self) -> DeviceMesh:
        mesh: DeviceMesh = self._group.mesh_info.mesh
        return mesh

    @property
    def mesh_ndim(self) -> int:
        return self.mesh.ndim

    @property
    def replicas(self) -> int:
        """Size of the replicate axis (HSDP), else 1."""
        return getattr(self._group.mesh_info, "replicate_mesh_size", 1)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The process group of the replicate axis (HSDP)."""
        return getattr(self._group.mesh_info, "replicate_process_group", None)

    @property
    def regather_world_size(self) -> int | None:
        """Ranks of the second gather under `reshard_after_forward=<int>`, else None."""
        info = self._group.post_forward_mesh_info
        if info is None or info is self._group.mesh_info:
            return None
        return info.shard_mesh_size

    @property
    def reshards_after_forward(self) -> bool:
        """Whether the gathered weights are freed before the backward pass."""
        return self._group.post_forward_mesh_info is not None

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """Element type of the reduce-scatter where the user set one."""
        dtype: torch.dtype | None = self._group.mp_policy.reduce_dtype
        return dtype

    @property
    def offloads_to_cpu(self) -> bool:
        return isinstance(self._group.offload_policy, CPUOffloadPolicy)

    @property
    def reduces_unused(self) -> bool:
        """Whether parameters without a gradient are reduced as zeros (torch 2.13)."""
        return getattr(self._group, "reduce_scatter_unused_params", False)

    @property
    def gathers_again(self) -> bool:
        """Whether the backward pass gathers the very shards that the forward pass did."""
        info = self._group.post_forward_mesh_info
        return info is not None and info is self._group.mesh_info

    @property
    def reshards_after_backward(self) -> bool:
        """Whether the gathered weights are freed after the backward pass."""
        reshards: bool = self._group.reshard_after_backward
        return reshards

    @property
    def gathers_in_backward(self) -> bool:
        """Whether weights that the forward pass freed are gathered for the backward pass."""
        gathers: bool = self._group.unshard_in_backward
        return gathers

    @property
    def reduces(self) -> bool:
        """Whether a backward pass ends with a reduce, and is no part of an accumulation."""
        reduces: bool = self._group.reduce_grads
        return reduces

    @property
    def all_reduces(self) -> bool:
        """Whether what was reduced is averaged over replicas now, and not put off."""
        all_reduces: bool = self._group.all_reduce_grads
        return all_reduces

    @property
    def has_divisor(self) -> bool:
        """Whether the user has said what to divide the sum over all ranks by, replicas included."""
        return self._group.gradient_divide_factor is not None

    @property
    def put_off(self) -> Tensor | None:
        """The sums of earlier backward passes that wait for their average over replicas, where
        FSDP2 keeps those of its own replicas: it drops them together with a pass cut short."""
        waiting: Tensor | None = self._group._partial_reduce_output
        return waiting

    def set_put_off(self, waiting: Tensor) -> None:
        """To be called after a backward pass: each reduce without replicas of FSDP2's clears it."""
        self._group._partial_reduce_output = waiting

    @property
    def prefetches(self) -> tuple[list[Any], list[Any]]:
        """The states of the groups that it gathers ahead, in a forward and in a backward pass,
        where the user has said which."""
        return self.state._states_to_forward_prefetch, self.state._states_to_backward_prefetch

    def requires_grad(self) -> list[bool]:
        """Whether each parameter is trained, in buffer order."""
        return [p.sharded_param.requires_grad for p in self._group.fsdp_params]

    def local_shards(self) -> list[Tensor]:
        """This rank's shard of each parameter, in buffer order."""
        return [p._sharded_local_tensor for p in self._group.fsdp_params]

    def only_views(self, output: Tensor) -> bool:
        """Whether FSDP2, after its reduce, only divides ``output`` and takes views of it as
        gradients, if that depends on what all ranks have in common; and there is an end of a
        backward pass to wait for."""
        return (
            output.device.type == "cpu"
            and in_backward()
            and not in_compiled_backward()
            and output.dtype == self._group._orig_dtype
            and self.replicas == 1
        )

    def may_fill_later(self, places: Sequence[int]) -> bool:
        """The same for what a rank may have alone: whether nothing is added to the gradients of the
        parameters at ``places``, and nobody is shown them, before the backward pass ends."""
        group = self._group
        params = [group.fsdp_params[i] for i in places]
        return (
            group._all_reduce_hook is None
            and all(p.sharded_param.grad is None and not p.offload_to_cpu for p in params)
            and not self.parameters_with_hooks().intersection(places)
        )

    def divider(self, output: Tensor) -> Callable[[Tensor], None]:
        """What FSDP2 does to the sum of a reduce, in place, as things are now: for a sum like
        ``output`` that it has not seen yet."""
        group = self._group
        _, factor, *_ = _fsdp_collectives._get_gradient_divide_factors(
            self.shard_group,
            None,
            output.dtype,
            output.device.type,
            group.gradient_divide_factor,
            group.force_sum_reduction_for_comms,
        )
        return partial(_fsdp_collectives._div_if_needed, div_factor=factor)

    def own_comms(self) -> list[object]:
        """Its collectives that are not FSDP2's default ones."""
        group = self._group
        pairs = (
            (group._all_gather_comm, _fsdp_collectives.DefaultAllGather),
            (group._reduce_scatter_comm, _fsdp_collectives.DefaultReduceScatter),
        )
        return [comm for comm, default in pairs if type(comm) is not default]

    def comms(self) -> tuple[Any, Any, bool, Any, bool]:
        """What `set_comms` takes."""
        group = self._group
        return (
            group._all_gather_comm,
            group._reduce_scatter_comm,
            group.force_sum_reduction_for_comms,
            group._all_reduce_hook,
            group.unshard_async_op,
        )

    def set_comms(
        self,
        all_gather: Any,
        reduce_scatter: Any,
        force_sum: bool,
        all_reduce_hook: Any,
        async_op: bool,
    ) -> None:
        """Give FSDP2 its collectives. With `async_op` gathers that it asks for ahead of time run
        beside the computation on CPUs too."""
        self.module.set_custom_all_gather(all_gather)
        self.module.set_custom_reduce_scatter(reduce_scatter)
        self.module.set_force_sum_reduction_for_comms(force_sum)
        self.module.set_all_reduce_hook(all_reduce_hook)
        self._group.unshard_async_op = async_op


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """The groups of all FSDPModules in ``model``, in module order, those without parameters out."""
    groups: dict[int, ParameterGroup] = {}
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = _state(module)
        modules.setdefault(id(state), []).append(module)
        if id(state) not in groups and _param_groups(state):
            members = tuple(_param_groups(state)[0].modules)
            num_groups = len(_param_groups(state))
            groups[id(state)] = ParameterGroup(module, members, state, num_groups)
    return list(groups.values())


def reshards_after_backward(model: nn.Module) -> bool:
    """Whether every group of ``model`` frees its gathered weights after the backward pass.

    True for a model without FSDP: there is nothing that could go stale.
    """
    return all(
        group.reshard_after_backward
        for parameters in parameter_groups(model)
        for group in _param_groups(parameters.state)
    )


def reshard(model: nn.Module) -> None:
    """Free every gathered weight of ``model``; does nothing where FSDP2 is not used.

    A group that stays gathered after a forward pass (the root does) would hide its shards from
    `model.parameters()`, and the next forward pass would not see an edit of them; nor would one
    whose gather is under way, since FSDP2 takes that for the next forward pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reshard_module(module)


def reshard_module(module: Any) -> None:
    """As `reshard`, the group of ``module`` alone."""
    if any(group._all_gather_result is not None for group in _param_groups(_state(module))):
        module.unshard()
    module.reshard()


def wholes(model: nn.Module) -> list[nn.Module]:
    """``model``, and the FSDP2 roots outside of it that it is a part of, known since their first
    pass: their groups may hold parameters of ``model``."""
    found = {id(model): model}
    for part in _fsdp_roots(model):
        for state in _state(part)._state_ctx.all_states:
            if state._is_root and not _state(part)._is_root:
                found[id(state._modules[0])] = state._modules[0]
    return list(found.values())


def behind_gathered(model: nn.Module) -> dict[int, nn.Parameter]:
    """By the `id` of a gathered parameter, which modules show as long as it is gathered, the shard
    that optimizers hold."""
    return {
        id(p._unsharded_param): p.sharded_param
        for whole in wholes(model)
        for group in parameter_groups(whole)
        for p in group._group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`named_parameters`, where those that are gathered now are their shards."""
    behind = behind_gathered(model)
    return {name: behind.get(id(p), p) for name, p in named_parameters(model).items()}


def has_pending_gradients(model: nn.Module) -> bool:
    """Whether FSDP2 holds gradients of ``model`` that it did not reduce yet."""
    return any(group.pending_gradients() for group in parameter_groups(model))


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that makes the buffers of ``model``, and of its `wholes`, what they are now, in
    place, and puts those back that were replaced meanwhile."""
    modules = {id(module): module for whole in wholes(model) for module in whole.modules()}
    kept = [(m, name, b) for m in modules.values() for name, b in m._buffers.items()]
    buffers = {id(b): b for *_, b in kept if b is not None and not is_lazy(b) and not b.is_nested}
    saved = [(buffer, buffer.shape, _once(buffer).clone()) for buffer in buffers.values()]

    def restore() -> None:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
        for buffer, shape, values in saved:
            with torch.inference_mode(buffer.is_inference()):
                if buffer.shape != shape:
                    buffer.data = values.expand(shape)
                else:
                    _once(buffer).copy_(values)

    return restore


def is_root(module: nn.Module) -> bool:
    """Whether FSDP2 takes a forward pass of ``module`` for one of the whole model."""
    return _state(module)._is_root is True


def due(model: nn.Module) -> str:
    """What qsdp's wire of ``model`` would learn of the weights before the next step, in words."""
    return " and ".join(passes.due for passes in _passes_of(model))


def settle(model: nn.Module) -> None:
    """Let it learn that now, before the weights are edited for something else."""
    for passes in _passes_of(model):
        passes.settle()


def becomes_root(module: nn.Module) -> bool:
    """`is_root`, asked before FSDP2 hears of a forward pass of ``module``: its first decides."""
    state = _state(module)
    if state._is_root is None:
        state._lazy_init()
    return is_root(module)


def stays_gathered_by_default(module: nn.Module) -> bool:
    """Whether FSDP2 keeps the weights of ``module``, a root, after its forward pass without having
    been asked to: for a backward pass that follows at once."""
    return bool(_state(module)._auto_reshard_after_forward)


def parts(root: nn.Module) -> list[Any]:
    """The states of all groups that FSDP2 has for a pass through ``root``, since its first."""
    return list(_state(root)._state_ctx.all_states)


def is_backward_cut_short(module: nn.Module) -> bool:
    """Whether the last backward pass through ``module``, a root, has begun but not ended; to be
    asked outside a backward pass."""
    return is_root(module) and bool(_state(module)._state_ctx.post_backward_final_callback_queued)


def rewind_point(model: nn.Module) -> Callable[[], None]:
    """A function that makes what qsdp's wire of ``model`` counts as it is now: for the second try
    of a step. Without the wire there is nothing to do."""
    points = [passes.rewind_point() for passes in _passes_of(model)]

    def rewind() -> None:
        for point in points:
            point()

    return rewind


def abandon_pass(model: nn.Module) -> None:
    """Make FSDP2 forget a forward or backward pass that an exception cut short.

    Weights that stayed gathered are freed, or the next pass would not see an edit of the shards,
    and gradients that were not reduced are dropped. The public `reset_iter_state` does most of it
    since torch 2.13. Does nothing where FSDP2 is not used.
    """
    for passes in _passes_of(model):
        passes.abandon_what_is_late()
    for root in _fsdp_roots(model):
        state = _state(root)
        if not state._is_root:  # no pass was begun, or it is a part: only a whole can be reset
            continue
        if hasattr(root, "reset_iter_state"):
            root.reset_iter_state()
        else:
            _reset_iteration(state)
        for group in (group for s in state._state_ctx.all_states for group in _param_groups(s)):
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def abandon_cut_short(model: nn.Module) -> None:
    """`abandon_pass` where FSDP2 is in the middle of a pass; none may be under way."""
    for root in _fsdp_roots(model):
        context = _state(root)._state_ctx
        if context.post_backward_final_callback_queued or any(
            state._training_state is not type(state._training_state).IDLE
            # One call to `fully_shard` for several modules waits for all of them.
            and not (len(state._modules) > 1 and state._modules_to_run_forward)
            for state in context.all_states
        ):
            abandon_pass(root)


def tensors_in(output: object) -> list[Tensor]:
    """The tensors of what a module returned, in whatever containers."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def in_backward() -> bool:
    """Whether the calling thread runs inside an autograd backward pass."""
    return backward_number() != -1


def in_compiled_backward() -> bool:
    """Whether a backward pass runs that `torch.compile` has made a graph of."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # a second to import
    return compiled is not None and bool(compiled.in_compiled_autograd_region)


def backward_number() -> int:
    """A number of the backward pass that the calling thread runs in; -1 outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number


def after_backward(work: Callable[[], None]) -> None:
    """Call ``work`` at the end of the backward pass that the calling thread is in."""
    torch.autograd.Variable._execution_engine.queue_callback(work)


def all_gather(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """All-gather 1-D ``input`` into ``output`` (renamed in torch 2.13)."""
    single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    work: dist.Work | None = single(output, input, group=group, async_op=async_op)
    return work


def reduce_scatter(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> None:
    """Sum-reduce-scatter 1-D ``input`` into ``output``, as FSDP2 does (renamed in torch 2.13)."""
    single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    single(output, input, group=group)


_num_names: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def unused_name(parent: dist.ProcessGroup) -> str:
    """A name for groups of ranks of ``parent``, none of which had it before: the same on all its
    ranks, which ask for names equally often."""
    _num_names[parent] = number = _num_names.get(parent, 0) + 1
    return f"qsdp {number} of {parent.group_name}"


def new_group(
    ranks: list[int], parent: dist.ProcessGroup, name: str, backend: str | None = None
) -> dist.ProcessGroup:
    """A process group of ``ranks``, which alone call this, with the timeout of ``parent``, and its
    backends where no other ``backend`` is given.

    `dist.new_group` lets ranks meet at a name with the number of groups that each knows. Ranks may
    know of different groups, and once one was destroyed the next has its name.
    """
    world = distributed_c10d._world
    timeout = parent._get_backend(device_of(parent)).options._timeout
    _, store = world.pg_map[distributed_c10d._get_default_group()]
    backend = backend or dist.get_backend_config(parent)
    # By one name where it is one for all devices: torch warns when it destroys one of a list.
    names = {each.rpartition(":")[2] for each in backend.split(",")}
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        distributed_c10d.Backend(names.pop() if len(names) == 1 else backend),
        store,
        cast(Any, name),
        timeout=timeout,
    )
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group


def destroy_group(group: dist.ProcessGroup) -> None:
    """Destroy ``group``, if that was not done together with the default one."""
    if group in distributed_c10d._world.pg_map:
        dist.destroy_process_group(group)


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""What the wrappers of `torch.compile` and of activation checkpointing call what they wrap."""


def clean_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """By each of ``names``, of what ``model`` holds, the one in the model as the user wrote it:
    without those of the wrappers of `torch.compile`, activation checkpointing and DDP.

    Raises ValueError if two become one.
    """
    clean: dict[str, str] = {}
    of: dict[str, str] = {}
    for name in names:
        short = _clean_name(model, name)
        if short in of:
            raise ValueError(
                f"{of[short]!r} and {name!r} are both {short!r} once the names of wrappers are "
                "left out; rename one of them"
            )
        clean[name], of[short] = short, name
    return clean


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model``, tied ones once, in its order, by their `clean_names`."""
    named = dict(model.named_parameters())
    return {clean: named[name] for name, clean in clean_names(model, named).items()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """As `named_parameters`, the buffers."""
    named = dict(model.named_buffers())
    return {clean: named[name] for name, clean in clean_names(model, named).items()}


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """By each name that DCP, which leaves out some wrappers' names itself, has for what ``model``
    holds: the clean one."""
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        theirs: clean
        for names in (parameters, model.state_dict())  # two spellings of what wrappers hold
        for name, clean in clean_names(model, names).items()
        for theirs in dcp_state_dict._get_fqns(model, name)
    }


def unwrapped(module: nn.Module) -> nn.Module:
    """What `torch.compile` and activation checkpointing have wrapped into ``module``, or itself."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where control messages of ``group`` lie: on the CPU where it serves one, since reading them
    from a GPU waits for all of the stream's work."""
    kinds = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend that serves tensors of ``device`` in ``group``: `gloo` or `nccl`, say."""
    name: str = group._get_backend(device).name()
    return name


def full_tensor(tensor: DTensor) -> Tensor:
    """The whole of ``tensor``, a collective. Over gloo a GPU's parts meet, and the whole is, on the
    CPU: `DTensor.full_tensor` would let gloo read the GPU's addresses as the host's."""
    mesh = tensor.device_mesh
    groups = mesh.get_all_groups()
    if tensor.device.type == "cpu" or all(backend_of(g, tensor.device) != "gloo" for g in groups):
        return tensor.full_tensor()
    names = mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim))
    on_cpu = DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=names)
    local = tensor.to_local().cpu()
    parts = DTensor.from_local(
        local, on_cpu, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return parts.full_tensor()


def _clean_name(model: nn.Module, name: str) -> str:
    module: Any = model
    parts = []
    for part in name.split("."):
        # What a wrapper does not have it looks up in what it wraps, so names may skip it.
        if part not in _WRAPPED:
            module = unwrapped(module)
        is_ddp = part == "module" and isinstance(module, DistributedDataParallel)
        if part not in _WRAPPED and not is_ddp:
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def _wrapped(module: Any) -> Any:
    children = getattr(module, "_modules", {})
    return next((children[name] for name in _WRAPPED if name in children), None)


def _once(tensor: Tensor) -> Tensor:
    """A view of ``tensor`` without the values that share the memory of others (`expand`)."""
    view = tensor.detach()
    if view.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
            if size > 1 and stride == 0:
                view = view.narrow(dim, 0, 1)
    return view


def _passes_of(model: nn.Module) -> list[Any]:
    """The passes (qsdp/fsdp/passes.py) of the wires that are installed on ``model``."""
    comms = [group.comms()[0] for group in parameter_groups(model)]
    return list({id(c.passes): c.passes for c in comms if hasattr(c, "passes")}.values())


def _fsdp_roots(module: nn.Module) -> Iterator[Any]:
    if isinstance(module, FSDPModule):
        yield module
    else:
        for child in module.children():
            yield from _fsdp_roots(child)


def _reset_iteration(state: Any) -> None:
    """What `reset_iter_state` does, on the fields of torch 2.11."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    state._comm_ctx.all_gather_state = None
    state._comm_ctx.reduce_scatter_state = None
    state._comm_ctx.post_forward_order.clear()
    for member in state._state_ctx.all_states:
        idle = type(member._training_state).IDLE
        member._training_state = idle
        member._modules_to_run_forward.clear()
        for group in _param_groups(member):
            if group._all_gather_result is not None:
                work = group._all_gather_result.all_gather_work
                if isinstance(work, dist.Work):
                    work.wait()
                group._all_gather_result = None
            group._post_reduce_event = None
            group._all_reduce_state = None
            group._reshard_after_forward_event = None
            group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = idle
            group._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _state(module: Any) -> Any:
    return module._get_fsdp_state()


def _param_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13
    if groups is not None:
        return list(groups)
    group = state._fsdp_param_group  # torch 2.11
    return [] if group is None else [group]


def _registered(fsdp_param: Any) -> Any:
    """The sharded parameter that its module has now. One that was set after `fully_shard`, as
    loading into a model made on the meta device does, enters FSDP2's tables with the first forward.
    """
    info = fsdp_param._module_info
    return getattr(info.module, info.param_name)


def _wire_dtype(dtype: torch.dtype, param_dtype: torch.dtype | None) -> torch.dtype:
    return param_dtype if param_dtype is not None and dtype.is_floating_point else dtype
