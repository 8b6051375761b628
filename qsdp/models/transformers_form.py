"""How the transformers library keeps a family of models. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from qsdp.models.size import ModelSize

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S", bound=ModelSize)


class TransformersForm(ABC, Generic[S]):
    """How the transformers library keeps the models of a family: config.json and tensors."""

    model_type: ClassVar[str]
    """What config.json calls the family; no other family has it."""
    base_prefix: ClassVar[str] = ""
    """What the tensors of a model with a head begin with, and those of the bare model do not."""

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

    def add_tensors(self, size: S, tensors: dict[str, Tensor]) -> None:
        """Add what the library needs besides those of our parameters: by default nothing."""
