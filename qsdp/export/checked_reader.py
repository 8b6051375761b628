"""A reader of a model on disk, once it is known that all can be read, written and is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from qsdp.checkpoint import TensorReader, verify
from qsdp.export.read_export import FACTS, ExportReader, verify_export
from qsdp.export.tensor_files import check_dtypes
from qsdp.models.load_safetensors import check_all_is_taken


def checked_reader(
    source: Path,
    model: nn.Module,
    dtype: torch.dtype | None,
    progress: Callable[[int], None],
) -> TensorReader | ExportReader:
    """Verify the files of ``source`` and read what tensors it has, of which ``model`` takes all.

    Args:
        source: A checkpoint's folder step-..., or an export's.
        model: What is saved there; it may be on the meta device.
        dtype: What the weights will be written in; None for what they are stored in.
        progress: Called with the number of bytes that were just verified.

    Raises:
        ValueError: A file is damaged, a tensor is missing, of another shape or none of the model's,
            or cannot be written.
    """
    parameters = dict(model.named_parameters())
    reader: TensorReader | ExportReader
    if (source / FACTS).is_file():
        verify_export(source, progress=progress)
        reader, known = ExportReader(source), {*parameters}
    else:
        verify(source, progress=progress)
        # It keeps buffers too, and tied parameters under all their names.
        reader, known = TensorReader(source), {*model.state_dict()}
    for name, parameter in parameters.items():
        reader.check(name, parameter.shape)
    check_all_is_taken(source, reader.names(), known)
    check_dtypes(source, {name: reader.dtype(name) for name in parameters}, dtype)
    return reader
