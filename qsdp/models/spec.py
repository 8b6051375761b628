"""What the trainer, the export and the commands need to know of a family of models.

No torch here: flags have presets for values, and are read before torch is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from qsdp.models.size import ModelSize
from qsdp.models.transformers_form import TransformersForm

if TYPE_CHECKING:
    from qsdp.models.language_model import LanguageModel

S = TypeVar("S", bound=ModelSize)


class ModelSpec(ABC, Generic[S]):
    """A family of models of sizes S. Methods import what needs torch when they are called."""

    sizes: type[S]
    """The dataclass of its sizes, which no other family has."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    """The fields of a size by the preset's name, which no other family has.
    A run puts the data's ``vocab_size`` in.
    """
    training: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The flags of training that have another default for a preset, by ``TrainConfig``'s names."""
    transformers: TransformersForm[S] | None = None
    """How the transformers library keeps such models, if it has them."""

    def size_of_preset(self, preset: str, vocab_size: int) -> S:
        """The size of ``preset`` with the vocabulary of the data."""
        return self.size(dict(self.presets[preset]) | {"vocab_size": vocab_size})

    def size(self, settings: Mapping[str, Any]) -> S:
        """The size of which ``asdict`` has made ``settings``, as checkpoints and exports state it.

        Raises TypeError or ValueError for settings that are none of this family's.
        """
        make: Callable[..., S] = self.sizes
        return make(**settings)

    @abstractmethod
    def build(self, size: S) -> LanguageModel:
        """A model of ``size``, on the device that torch makes tensors on now.

        That is the meta device, where it is to be sharded. Its values are of no account.
        """

    @abstractmethod
    def init_weights(self, model: LanguageModel, seed: int) -> None:
        """Fill the parameters in place, plain or sharded by FSDP2.

        Each is a pure function of the seed and its name, so that the model is the same for every
        number of ranks; ``fill_parameters`` does it for a standard deviation a name. Raises
        ValueError for a negative seed and for a parameter on the meta device.
        """

    @abstractmethod
    def flops_per_token(self, size: S, seq_len: int) -> int:
        """Floating-point operations of one forward and backward, a token of a sequence."""
