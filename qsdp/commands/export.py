"""The command line of ``qsdp export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qsdp.commands.exit import one_sentence_at_the_end
from qsdp.commands.parsing import one_sentence
from qsdp.commands.streaming_bar import GIB, check_streaming, streaming_bar
from qsdp.common.allocator import return_freed_memory
from qsdp.common.user_errors import UserError, sentence

_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write a trained model as a folder that the transformers library loads.

    One process, one tensor in memory at a time: the model may be larger than memory, and the
    checkpoint may come from any number of ranks. OUT then holds config.json, model.safetensors and
    the tokenizer, for AutoModelForCausalLM and AutoTokenizer. What was compressed keeps its exact
    zeros, and qsdp_compression.json says what was done.
    """

    source: tyro.conf.Positional[Path]
    """A checkpoint's folder step-..., a run's folder, or what qsdp compress has written.
    Of a run's folder it is the newest checkpoint.
    """

    out: Path
    """The folder to make; it appears when it is complete."""

    dtype: Annotated[str | None, tyro.conf.arg(metavar="|".join(_DTYPES))] = None
    """What the weights are written in. Unset: as they are stored, which is fp32 in a run.
    A weight that is too large for fp16 is refused.
    """

    max_file_gib: float = 2.0
    """The most GiB of tensors in one file; more go into several files with an index."""


def main(argv: Sequence[str] | None = None) -> None:
    """Export as ``argv`` says. Exits with 2, in one sentence, on a user's mistake."""
    with one_sentence_at_the_end("nothing was written"):
        flags = parse_export_flags(argv)
        try:
            _export(flags)
        except (ValueError, OSError) as error:
            raise UserError(sentence(error)) from None


def parse_export_flags(argv: Sequence[str] | None = None) -> ExportFlags:
    """The flags of the command that exports, in ``argv``.

    Raises UserError for a mistake, SystemExit(0) after ``--help``.
    """
    flags = one_sentence(lambda: tyro.cli(ExportFlags, args=argv))
    if flags.dtype not in (None, *_DTYPES):
        raise UserError(f"--dtype is {flags.dtype!r}: choose one of {', '.join(_DTYPES)}.")
    check_streaming(flags.max_file_gib)
    return flags


def _export(flags: ExportFlags) -> None:
    from rich.console import Console

    from qsdp.common.dtypes import of_precision
    from qsdp.export import export_transformers
    from qsdp.train.trained_model import open_trained_model

    return_freed_memory()
    source = open_trained_model(flags.source)
    console = Console()
    with streaming_bar(console) as progress:
        settings = export_transformers(
            source.path,
            source.size,
            flags.out,
            dtype=None if flags.dtype is None else of_precision(flags.dtype),
            file_bytes=round(flags.max_file_gib * GIB),
            progress=progress,
        )
    has_tokenizer = (flags.out / "tokenizer.json").is_file()
    tokenizer = (
        "with its tokenizer" if has_tokenizer else "without a tokenizer, as the run has none"
    )
    console.print(
        f"{source.path} exported in {settings['dtype']}, {tokenizer}; transformers loads it from "
        f"{flags.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
