"""The command line of ``qsdp evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from qsdp.commands.exit import one_sentence_at_the_end
from qsdp.commands.parsing import one_sentence
from qsdp.common.user_errors import UserError, quoted
from qsdp.train.evaluate_flags import SPLITS, EvaluateFlags
from qsdp.train.run_flags import BACKENDS


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as ``argv`` says.

    Exits, with one sentence: with 2 on a user's mistake, 1 if another rank is lost, 130 on Ctrl-C.
    """
    with one_sentence_at_the_end("nothing was written"):
        flags = parse_evaluate_flags(argv)
        from qsdp.train.evaluate_targets import evaluate_targets  # loads torch

        evaluate_targets(flags)


def parse_evaluate_flags(argv: Sequence[str] | None = None) -> EvaluateFlags:
    """The flags of the command that evaluates, in ``argv``.

    Raises UserError for a mistake, SystemExit(0) after ``--help``.
    """
    flags = one_sentence(lambda: tyro.cli(EvaluateFlags, args=argv))
    try:
        _ = flags.chosen
    except ValueError as error:
        raise UserError(f"--targets: {quoted(error)}.") from None
    try:
        _ = flags.chosen_method
    except ValueError as error:
        raise UserError(str(error)) from None
    if flags.split not in SPLITS:
        raise UserError(f"--split is {flags.split!r}: choose val or test.")
    if flags.eval_batches is not None and not 0 <= flags.eval_batches < 1 << 40:
        raise UserError(f"--eval-batches is {flags.eval_batches}: choose 1 or more, or 0 for all.")
    if flags.backend not in (None, *BACKENDS):
        raise UserError(f"--backend is {flags.backend!r}: choose nccl or gloo.")
    if not 1 <= flags.timeout_s <= 1 << 31:
        raise UserError(f"--timeout-s is {flags.timeout_s}: choose 1 second or more.")
    if flags.out is not None and flags.out.exists() and not flags.out.is_dir():
        raise UserError(f"--out {flags.out} is a file: give a folder.")
    return flags
