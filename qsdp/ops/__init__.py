"""The operators on payloads, sparse buffers, magnitudes and rotations, as ``schema`` lists them.

A call reaches the best kernel for its tensors: those of csrc/, or the specification in
``reference``.
"""

from __future__ import annotations

import torch

from qsdp.ops import native, schema

native.load()

encode = torch.ops.qsdp.encode
decode = torch.ops.qsdp.decode
encode_all = torch.ops.qsdp.encode_all
decode_all = torch.ops.qsdp.decode_all
encode_changes = torch.ops.qsdp.encode_changes
apply_changes = torch.ops.qsdp.apply_changes
compact = torch.ops.qsdp.compact
expand = torch.ops.qsdp.expand
count_digits = torch.ops.qsdp.count_digits
mark_above = torch.ops.qsdp.mark_above
rotate = torch.ops.qsdp.rotate

__all__ = [
    "apply_changes",
    "compact",
    "count_digits",
    "decode",
    "decode_all",
    "encode",
    "encode_all",
    "encode_changes",
    "expand",
    "mark_above",
    "native",
    "rotate",
    "schema",
]
