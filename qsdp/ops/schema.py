"""The operators of qsdp: their signatures, the specification of each, and what torch.compile sees.

A kernel of csrc/ is registered under the same name for its device and takes the specification's
place there; see csrc/README.md for a kernel in five steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qsdp.ops.reference import apply_changes, changes, codec, magnitude, rotation, sparse

KERNELS: dict[str, Callable[..., None]] = {
    "encode": codec.encode,
    "decode": codec.decode,
    "encode_all": codec.encode_all,
    "decode_all": codec.decode_all,
    "encode_changes": changes.encode_changes,
    "apply_changes": apply_changes.apply_changes,
    "compact": sparse.compact,
    "expand": sparse.expand,
    "count_digits": magnitude.count_digits,
    "mark_above": magnitude.mark_above,
    "rotate": rotation.rotate,
}
"""The specification of each operator, by its name. All write into what they are given."""

_SIGNATURES = (
    "encode(Tensor buffer, Tensor table, int key, int[] header, Tensor(a!) payload, "
    "Tensor? levels=None) -> ()",
    "decode(Tensor payload, Tensor table, int key, Tensor(a!) buffer, bool add=False, "
    "Tensor? levels=None) -> ()",
    "encode_all(Tensor buffers, Tensor tables, Tensor parts, int[] header, Tensor(a!) payloads, "
    "Tensor? levels=None) -> ()",
    "decode_all(Tensor payloads, Tensor tables, Tensor parts, Tensor(a!) buffers, "
    "Tensor? levels=None) -> ()",
    "encode_changes(Tensor buffer, Tensor table, int key, Tensor kept, Tensor modes, int step, "
    "int redraw_every, float room, Tensor(a!) frame, Tensor(b!) counts) -> ()",
    "apply_changes(Tensor frame, Tensor table, int step, Tensor(a!) kept) -> ()",
    "compact(Tensor dense, Tensor spans, Tensor bitmap, Tensor(a!) out, bool strict) -> ()",
    "expand(Tensor compact, Tensor spans, Tensor bitmap, Tensor(a!) out) -> ()",
    "count_digits(Tensor values, Tensor prefix, int shift, int width, Tensor(a!) counts) -> ()",
    "mark_above(Tensor values, int key, Tensor(a!) out) -> ()",
    "rotate(Tensor(a!) buffer, Tensor stretches) -> ()",
)


def _no_result(*_: object) -> None:
    """What an operator returns where tensors have no values."""


_library = torch.library.Library("qsdp", "DEF")
for _signature in _SIGNATURES:
    _library.define(_signature)
for _name, _kernel in KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qsdp::{_name}", _no_result, lib=_library)
