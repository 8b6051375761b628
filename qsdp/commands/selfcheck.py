"""The command line of ``qsdp selfcheck``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from qsdp.commands.exit import one_sentence_at_the_end
from qsdp.commands.parsing import one_sentence
from qsdp.common.user_errors import UserError
from qsdp.train.run_flags import BACKENDS


@dataclass(frozen=True, kw_only=True)
class SelfcheckFlags:
    """Prove codec, collectives and hooks on the real backend, in about a minute.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m qsdp selfcheck

    On GPUs that is NCCL, with a GPU for every rank. With --backend gloo ranks may share GPUs, which
    NCCL refuses: it proves kernels, hooks and streams on a single GPU, and nothing of NCCL.

    Every check runs on every rank; rank 0 prints the table. Exit status 0 if all hold, 1 if not.
    """

    backend: str | None = None
    """nccl or gloo. Unset: nccl on GPUs, gloo on CPUs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run all checks. Exits with 0 if all hold, 1 if not, 2 on a user's mistake."""
    with one_sentence_at_the_end("nothing was proved"):
        flags = one_sentence(lambda: tyro.cli(SelfcheckFlags, args=argv))
        if flags.backend not in (None, *BACKENDS):
            raise UserError(f"--backend is {flags.backend!r}: choose nccl or gloo.")
        from qsdp.commands.hook_checks import run_all_checks  # loads torch
        from qsdp.train.world import open_world

        with open_world(backend=flags.backend) as world:
            status = run_all_checks(world)
        raise SystemExit(status)
