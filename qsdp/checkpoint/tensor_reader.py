"""Reading a checkpoint tensor by tensor, in one process, whatever ranks wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from qsdp.checkpoint.plain_values import Refused
from qsdp.checkpoint.safe_dcp import SafeLoadPlanner, SafeReader

_MODEL = "model."


class TensorReader:
    """Reads one checkpoint's model tensor by tensor, each in memory only while someone holds it."""

    def __init__(self, path: Path) -> None:
        """Read the table of contents of the checkpoint at ``path``.

        Raises ValueError if there is no readable one, or one that asks for code.
        """
        self._path = path
        self._reader = SafeReader(path)
        self._metadata = self._reader.metadata
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def names(self) -> list[str]:
        """The names of all that it holds of the model: parameters, and buffers that are kept."""
        stored = self._metadata.state_dict_metadata
        return [name.removeprefix(_MODEL) for name in stored if name.startswith(_MODEL)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the parameter ``name``. Raises ValueError if there is none."""
        return self._stored(name).properties.dtype

    def shape(self, name: str) -> torch.Size:
        """The shape of the parameter ``name``. Raises ValueError if there is none."""
        return self._stored(name).size

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError unless there is a parameter ``name`` of this shape."""
        stored = self._stored(name)
        if stored.size != shape:
            raise ValueError(
                f"{self._path} holds {name} of shape {tuple(stored.size)}, but its model needs "
                f"{tuple(shape)}: name another checkpoint."
            )

    def read(self, name: str) -> Tensor:
        """The whole parameter ``name``, on the CPU. It holds one rank's part of it beside it.

        Raises ValueError if there is none, or it cannot be read.
        """
        stored = self._stored(name)
        planner = SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
            planner.set_up_planner(
                {_stored_name(name): tensor}, self._metadata, is_coordinator=True
            )
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        except Refused:
            raise
        except Exception as error:
            raise ValueError(
                f"{name} of {self._path} cannot be read ({type(error).__name__}): name another "
                "checkpoint."
            ) from error
        return tensor

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(_stored_name(name))
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(
                f"{self._path} holds no parameter {name}: name a checkpoint of this job."
            )
        return stored


def _stored_name(name: str) -> str:
    return f"{_MODEL}{name}"
