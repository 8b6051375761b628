"""How the transformers library keeps a family of models. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from qsdp.models.size import ModelSize

S = TypeVar("S", bound=ModelSize)
Shape = tuple[int, ...]


class TransformersForm(ABC, Generic[S]):
    """How the transformers library keeps the models of a family: config.json and tensors."""

    model_type: ClassVar[str]
    """What config.json calls the family; no other family has it."""
    base_prefix: ClassVar[str] = ""
    """What the tensors of a model with a head begin with, and those of the bare model do not."""
    buffers: ClassVar[str] = ""
    """A regular expression of tensors that are constants, which older versions of it have saved."""
    tied: ClassVar[Mapping[str, str]] = {}
    """Which tensor each one equals that a model of tied weights may hold besides."""

    @abstractmethod
    def size(self, settings: Mapping[str, Any], path: Path) -> S:
        """The size that the settings of a config.json describe, dropout left out.

        Raises ValueError, naming ``path``, for a model whose function ours does not compute, and
        KeyError for a setting that is missing.
        """

    @abstractmethod
    def settings(self, size: S) -> dict[str, Any]:
        """The config.json of a model of ``size``, of which ``size`` makes its size again."""

    @abstractmethod
    def tensor_name(self, parameter: str) -> tuple[str, bool]:
        """The tensor that keeps a parameter, and whether it is kept transposed."""

    def zero_tensors(self, size: S, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The tensors of zeros that the library needs besides those of our parameters.

        By default there are none. ``shapes`` are those of our parameters' tensors as it keeps them.
        """
        return {}
