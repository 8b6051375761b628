"""One-shot compression of a model in memory, for good or for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qsdp.common.bitmask import PackedMask
from qsdp.common.meshes import groups_of
from qsdp.common.rank_agreement import meet, mistakes_shared
from qsdp.compat.installed_wire import adapt_now, aside, pending_adaptation
from qsdp.compat.interrupted_passes import abandon_interrupted_pass
from qsdp.compat.module_buffers import snapshot_buffers
from qsdp.compat.resharding import reshard
from qsdp.oneshot.registry import DEFAULT, solver_of
from qsdp.oneshot.solver import Solver
from qsdp.sparsity.compression_target import Compression
from qsdp.sparsity.prunable import Prunable


def compress_(
    model: nn.Module,
    target: float | str | Compression,
    patterns: Sequence[str] | None = None,
    *,
    method: str = DEFAULT,
    tokens: Tensor | None = None,
) -> dict[str, PackedMask]:
    """Compress a ``model`` in memory in one shot, in place and for good. A collective.

    Args:
        model: Any module, sharded or not; not in the middle of a forward or backward pass.
        target: A fraction of the prunable weights, or what ``Compression.of`` reads.
        patterns: The prunable set, as in ``prunable_parameters``.
        method: A name in ``qsdp.oneshot.registry``: who decides which weights stay.
        tokens: What to calibrate on, for a method that needs it: int64 [sequences, context], the
            same on every rank.

    Returns:
        What was kept of this rank's part of each prunable parameter, by its name.

    Raises:
        ValueError: A parameter cannot have the target, or the method cannot be.
        RuntimeError: On all ranks, where target, patterns or method differ.
    """
    call = "qsdp.oneshot.compress_"
    solver, chosen, prunable = _meet(call, model, target, patterns, method, tokens)
    with torch.no_grad():
        masks = solver.compress_(model, prunable, chosen, tokens)
    return dict(zip(prunable.names, masks, strict=True))


@contextlib.contextmanager
def compressed(
    model: nn.Module,
    target: float | str | Compression,
    patterns: Sequence[str] | None = None,
    *,
    method: str = DEFAULT,
    tokens: Tensor | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context, the ``model`` in memory is compressed in one shot; then as before.

    The arguments, and what raises, are those of ``compress_``. The model is restored bit for bit,
    buffers included, also when the body raises. It costs a copy of the prunable shards and of the
    buffers. A collective on entry.

    Yields:
        The compressed parameters by name.
    """
    solver, chosen, prunable = _meet("qsdp.compressed", model, target, patterns, method, tokens)
    shards = prunable.shards()
    before, restore_buffers = [shard.values.clone() for shard in shards], snapshot_buffers(model)
    with aside(model):
        try:
            with torch.no_grad():
                solver.compress_(model, prunable, chosen, tokens)
            yield dict(zip(prunable.names, prunable.parameters, strict=True))
        except BaseException:
            abandon_interrupted_pass(model)
            raise
        finally:
            reshard(model)
            with torch.no_grad():
                for shard, values in zip(shards, before, strict=True):
                    shard.values.copy_(values)
            restore_buffers()


def _meet(
    call: str,
    model: nn.Module,
    target: float | str | Compression,
    patterns: Sequence[str] | None,
    method: str,
    tokens: Tensor | None,
) -> tuple[Solver, Compression, Prunable]:
    """Agree on what is to be done to ``model``, and leave it as it is between steps."""
    reshard(model)
    groups = groups_of(model.parameters())
    with mistakes_shared(call, groups):
        solver = solver_of(method, has_tokens=tokens is not None)
        chosen = Compression.of(target)
        prunable = Prunable.of(model, patterns)
        prunable.check(chosen)
        facts: dict[str, object] = {
            "target": str(chosen),
            "prunable parameters": prunable.names,
            "trained ones": prunable.trained().names,
            "method": method,
        }
    meet(call, {**facts, "due before it": pending_adaptation(model)}, groups)
    adapt_now(model)
    return solver, chosen, prunable
