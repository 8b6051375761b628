"""The command line of ``qsdp train``: flags over a TOML file over the model's preset."""

from __future__ import annotations

from collections.abc import Sequence

from qsdp.commands.exit import one_sentence_at_the_end
from qsdp.commands.parsing import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Train as ``argv`` says.

    Exits, with one sentence: with 2 on a user's mistake, 1 if another rank is lost, 130 on Ctrl-C.
    """
    with one_sentence_at_the_end("the same command goes on from the newest checkpoint"):
        config = parse(argv)
        from qsdp.ops import native  # loads torch: only after the flags have been checked
        from qsdp.train.loop import training_loop

        native.say_no_more()
        training_loop(config)
