"""The parameters that one ``fully_shard`` call gathers and reduces together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from qsdp.compat.fsdp_state import param_groups_of, state_of


@dataclass(frozen=True)
class GroupParameter:
    """What FSDP2's own tables say of one parameter of a ``ParameterGroup``."""

    parameter: nn.Parameter
    """The sharded DTensor that ``module.parameters()`` shows while the group is sharded."""
    dtype: torch.dtype
    """Element type in the all-gather buffer, ``param_dtype`` applied."""
    shard_dim: int
    padded_numel: int
    """Values that every rank's slice takes in the flat buffer."""
    is_extension: bool
    """Whether the tensor brings its own all-gather (fsdp_pre_all_gather), as float8 does."""
    mesh_ndim: int
    """Dimensions of its DTensor mesh: more than the group's under tensor parallelism."""


@dataclass(frozen=True)
class ParameterGroup:
    """A parameter group: what one ``fully_shard`` call gathers and reduces together."""

    module: FSDPModule
    """The first of its modules: setters on it act on the group."""
    modules: tuple[nn.Module, ...]
    state: Any
    num_groups: int
    """More than one where parameters have meshes of their own."""

    @property
    def fsdp_param_group(self) -> Any:
        """FSDP2's own object."""
        return param_groups_of(self.state)[0]

    def parameters(self) -> list[GroupParameter]:
        """The group's parameters in buffer order, while it is sharded."""
        pairs = [(_registered(p), p) for p in self.fsdp_param_group.fsdp_params]
        return [
            GroupParameter(
                parameter=parameter,
                dtype=_wire_dtype(parameter.dtype, self.fsdp_param_group.mp_policy.param_dtype),
                shard_dim=p.fsdp_placement.dim,
                padded_numel=p.padded_sharded_param_size.numel(),
                is_extension=hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather"),
                mesh_ndim=parameter.device_mesh.ndim,
            )
            for parameter, p in pairs
        ]

    def sharded_parameters(self) -> list[nn.Parameter]:
        """What optimizers hold, in buffer order."""
        return [p.sharded_param for p in self.fsdp_param_group.fsdp_params]

    def unsharded_parameters(self) -> list[Tensor | None]:
        """The tensors that autograd sees, in buffer order; None before the first gather."""
        return [getattr(p, "_unsharded_param", None) for p in self.fsdp_param_group.fsdp_params]

    def init_unsharded_parameters(self) -> None:
        """Gather once outside inference mode, if nothing was gathered yet.

        FSDP2 keeps the buffers of its first gather, and those of inference mode cannot be written
        in training.
        """
        if None in self.unsharded_parameters():
            with torch.inference_mode(False), torch.no_grad():
                self.module.unshard()
                self.module.reshard()

    @property
    def is_gathered(self) -> bool:
        """Whether the whole weights are in memory: a forward pass would not gather them."""
        is_unsharded: bool = self.fsdp_param_group.is_unsharded
        return is_unsharded

    def pending_gradients(self) -> set[int]:
        """Places of the parameters with a gradient that was not reduced yet."""
        return {
            i
            for i, p in enumerate(self.fsdp_param_group.fsdp_params)
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
        return any(p.sharded_param.grad is not None for p in self.fsdp_param_group.fsdp_params)

    @property
    def has_gradient_hooks(self) -> bool:
        """Whether it has hooks that FSDP2 calls with what a reduce has brought."""
        has_hook = self.fsdp_param_group._all_reduce_hook is not None
        return has_hook or bool(self.parameters_with_hooks())

    @property
    def has_own_reduce_group(self) -> bool:
        """Whether gradients have a process group of their own (torch 2.13)."""
        mesh_info = self.fsdp_param_group.mesh_info
        return getattr(mesh_info, "reduce_scatter_process_group", None) is not None

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The process group of the all-gather; None when the mesh has no shard axis."""
        return getattr(self.fsdp_param_group.mesh_info, "shard_process_group", None)

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh of the ``fully_shard`` call."""
        mesh: DeviceMesh = self.fsdp_param_group.mesh_info.mesh
        return mesh

    @property
    def mesh_ndim(self) -> int:
        """Dimensions of the mesh: two for HSDP."""
        return self.mesh.ndim

    @property
    def replicas(self) -> int:
        """Size of the replicate axis (HSDP), else 1."""
        return getattr(self.fsdp_param_group.mesh_info, "replicate_mesh_size", 1)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The process group of the replicate axis (HSDP)."""
        return getattr(self.fsdp_param_group.mesh_info, "replicate_process_group", None)

    @property
    def regather_world_size(self) -> int | None:
        """Ranks of the second gather under ``reshard_after_forward=<int>``, else None."""
        info = self.fsdp_param_group.post_forward_mesh_info
        if info is None or info is self.fsdp_param_group.mesh_info:
            return None
        return info.shard_mesh_size

    @property
    def reshards_after_forward(self) -> bool:
        """Whether the gathered weights are freed before the backward pass."""
        return self.fsdp_param_group.post_forward_mesh_info is not None

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """Element type of the reduce-scatter where the user set one."""
        dtype: torch.dtype | None = self.fsdp_param_group.mp_policy.reduce_dtype
        return dtype

    @property
    def offloads_to_cpu(self) -> bool:
        """Whether the user chose ``CPUOffloadPolicy``."""
        return isinstance(self.fsdp_param_group.offload_policy, CPUOffloadPolicy)

    @property
    def reduces_unused(self) -> bool:
        """Whether parameters without a gradient are reduced as zeros (torch 2.13)."""
        return getattr(self.fsdp_param_group, "reduce_scatter_unused_params", False)

    @property
    def gathers_again(self) -> bool:
        """Whether the backward pass gathers the very shards that the forward pass did."""
        info = self.fsdp_param_group.post_forward_mesh_info
        return info is not None and info is self.fsdp_param_group.mesh_info

    @property
    def reshards_after_backward(self) -> bool:
        """Whether the gathered weights are freed after the backward pass."""
        reshards: bool = self.fsdp_param_group.reshard_after_backward
        return reshards

    @property
    def gathers_in_backward(self) -> bool:
        """Whether weights that the forward pass freed are gathered for the backward pass."""
        gathers: bool = self.fsdp_param_group.unshard_in_backward
        return gathers

    @property
    def reduces(self) -> bool:
        """Whether a backward pass ends with a reduce, and is no part of an accumulation."""
        reduces: bool = self.fsdp_param_group.reduce_grads
        return reduces

    @property
    def all_reduces(self) -> bool:
        """Whether what was reduced is averaged over replicas now, and not put off."""
        all_reduces: bool = self.fsdp_param_group.all_reduce_grads
        return all_reduces

    @property
    def has_divisor(self) -> bool:
        """Whether the user has said what to divide the sum over all ranks by, replicas included."""
        return self.fsdp_param_group.gradient_divide_factor is not None

    @property
    def partial_reduce_output(self) -> Tensor | None:
        """The sums of earlier backward passes that wait for their average over replicas.

        They are here where FSDP2 keeps those of its own replicas: it drops them together with a
        pass that is cut short.
        """
        waiting: Tensor | None = self.fsdp_param_group._partial_reduce_output
        return waiting

    def set_partial_reduce_output(self, waiting: Tensor) -> None:
        """Keep the sums after a backward pass: a reduce without replicas of FSDP2's clears them."""
        self.fsdp_param_group._partial_reduce_output = waiting

    @property
    def prefetches(self) -> tuple[list[Any], list[Any]]:
        """The states of the groups that it gathers ahead, in a forward and in a backward pass.

        Only where the user has said which.
        """
        return self.state._states_to_forward_prefetch, self.state._states_to_backward_prefetch

    def requires_grad(self) -> list[bool]:
        """Whether each parameter is trained, in buffer order."""
        return [p.sharded_param.requires_grad for p in self.fsdp_param_group.fsdp_params]

    def local_shards(self) -> list[Tensor]:
        """This rank's shard of each parameter, in buffer order."""
        return [p._sharded_local_tensor for p in self.fsdp_param_group.fsdp_params]

    def custom_comms(self) -> list[object]:
        """Its collectives that are not FSDP2's default ones."""
        group = self.fsdp_param_group
        pairs = (
            (group._all_gather_comm, _fsdp_collectives.DefaultAllGather),
            (group._reduce_scatter_comm, _fsdp_collectives.DefaultReduceScatter),
        )
        return [comm for comm, default in pairs if type(comm) is not default]

    def comms(self) -> tuple[Any, Any, bool, Any, bool]:
        """What ``set_comms`` takes."""
        group = self.fsdp_param_group
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
        """Give FSDP2 its collectives.

        With ``async_op`` gathers that it asks for ahead of time run beside the computation on CPUs
        too.
        """
        self.module.set_custom_all_gather(all_gather)
        self.module.set_custom_reduce_scatter(reduce_scatter)
        self.module.set_force_sum_reduction_for_comms(force_sum)
        self.module.set_all_reduce_hook(all_reduce_hook)
        self.fsdp_param_group.unshard_async_op = async_op


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """The parameter groups of all FSDPModules in ``model``, in module order."""
    groups: dict[int, ParameterGroup] = {}
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = state_of(module)
        modules.setdefault(id(state), []).append(module)
        if id(state) not in groups and param_groups_of(state):
            members = tuple(param_groups_of(state)[0].modules)
            num_groups = len(param_groups_of(state))
            groups[id(state)] = ParameterGroup(module, members, state, num_groups)
    return list(groups.values())


def modules_without_group(model: nn.Module) -> list[nn.Module]:
    """The FSDPModules in ``model`` that have no parameters of their own, a root maybe."""
    sharded = (module for module in model.modules() if isinstance(module, FSDPModule))
    return [module for module in sharded if not param_groups_of(state_of(module))]


def groups_have_pending_gradients(model: nn.Module) -> bool:
    """Whether a parameter group of ``model`` holds gradients that FSDP2 did not reduce yet."""
    return any(group.pending_gradients() for group in parameter_groups(model))


def _registered(fsdp_param: Any) -> Any:
    """The sharded parameter that its module has now.

    One that was set after ``fully_shard``, as loading into a model made on the meta device does,
    enters FSDP2's tables with the first forward.
    """
    info = fsdp_param._module_info
    return getattr(info.module, info.param_name)


def _wire_dtype(dtype: torch.dtype, param_dtype: torch.dtype | None) -> torch.dtype:
    return param_dtype if param_dtype is not None and dtype.is_floating_point else dtype
