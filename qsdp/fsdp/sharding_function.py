"""Functions that other libraries call to shard a model, with the wire installed at their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qsdp.config import QSDPConfig
from qsdp.fsdp.handle import Handle
from qsdp.fsdp.install import install
from qsdp.fsdp.whole_state import load_whole_state, whole_state


class ShardingFunction:
    """A function that shards a model, and installs the wire on it then.

    It is called as the function that it is made of. Afterwards ``handle`` is the wire's, and
    ``state_dict`` and ``load_state_dict`` are of its whole state.
    """

    def __init__(self, shard: Callable[..., nn.Module], wire: QSDPConfig | None) -> None:
        """``shard`` takes a model first, and returns it; ``wire`` says how it is to travel."""
        self._shard, self._wire = shard, wire
        self._handle: Handle | None = None

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Shard the model and install the wire; a collective.

        Raises:
            ValueError: This was called before; or as ``install``.
        """
        if self._handle is not None:
            raise ValueError(
                "this function has put the wire on a model already: wrap what shards once more for "
                "another model."
            )
        model = self._shard(model, *args, **kwargs)
        self._handle = install(model, self._wire)
        return model

    @property
    def handle(self) -> Handle:
        """The wire of the model, once that was sharded."""
        if self._handle is None:
            raise RuntimeError(
                "no model was sharded yet, so that there is no wire: set the model up first."
            )
        return self._handle

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the wire; a collective. See ``whole_state``."""
        return whole_state(self.handle)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it, after weights, optimizer and masks; a collective. See ``load_whole_state``."""
        load_whole_state(self.handle, state)
