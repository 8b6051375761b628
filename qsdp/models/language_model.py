"""What a language model of any family is."""

from __future__ import annotations

from torch import Tensor, nn

from qsdp.models.size import ModelSize


class LanguageModel(nn.Module):
    """A module that predicts the next token, with its blocks in ``blocks``.

    Each block is one FSDP group, and everything else is the root's; what compression prunes by
    default is the linear layers of the blocks. A block takes x_BTD (batch, tokens, width) alone and
    returns the same shape; without any, the model still computes, so that both can be timed.
    Parameters are float; no buffers, since the model is made on the meta device and only parameters
    are filled.
    """

    config: ModelSize
    blocks: nn.ModuleList
    """The blocks, called in this order."""

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict the token after each of ``tokens_BT`` (int64), which may see no later one.

        Without targets: (logits_BTV, None). With targets (int64): (None, loss), the mean
        cross-entropy in nats a token, an fp32 scalar. Raises ValueError for a sequence longer than
        the context.
        """
        raise NotImplementedError
