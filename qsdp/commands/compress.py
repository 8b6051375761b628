"""The command line of ``qsdp compress``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qsdp.commands.exit import one_sentence_at_the_end
from qsdp.commands.parsing import one_sentence, with_flag
from qsdp.commands.streaming_bar import GIB, check_streaming, streaming_bar
from qsdp.common.allocator import return_freed_memory
from qsdp.common.user_errors import UserError, quoted, sentence
from qsdp.oneshot.registry import SOLVERS, by_method, chosen_method
from qsdp.sparsity.compression_target import Compression


@dataclass(frozen=True, kw_only=True)
class CompressFlags:
    """Compress a training checkpoint in one shot, without training, and write it as safetensors.

    One process, one tensor in memory at a time: the model may be larger than memory, and the
    checkpoint may come from any number of ranks. OUT then holds model.safetensors (dense, pruned
    weights exactly 0), masks.safetensors (1 bit a prunable weight), compression.json (what was
    done, with the zeros counted) and the tokenizer. qsdp evaluate reads it.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint's folder step-..., or a run's folder: then its newest checkpoint."""

    out: Path
    """The folder to make; it appears when it is complete."""

    sparsity: float | None = None
    """Fraction of the prunable weights to set to zero. 0 exports the dense model."""

    pattern: str | None = None
    """N:M in place of --sparsity: of every M weights along the input dimension N stay.
    The N largest do.
    """

    bits: int | None = None
    """Bits of the weights that stay, 2 to 8. Alone, or with one of the two above.
    The nearest of 2**bits - 1 symmetric levels is taken; 128 weights of a row share a scale.
    """

    scope: str | None = None
    """Which weights compete: global or layer. Unset: global.
    With global the weights of all prunable matrices compete, with layer each matrix loses the
    same fraction.
    """

    block: int | None = None
    """Weights along the input dimension that stay or go together, by the sum of magnitudes.
    Unset: 1.
    """

    method: Annotated[str | None, tyro.conf.arg(metavar="|".join(SOLVERS))] = None
    """Who decides which weights stay and what they become. Unset: magnitude (the largest stay)."""

    prunable: str | None = None
    """Shell-style patterns of the parameters to compress, with commas between. Unset: the run's."""

    max_file_gib: float = 2.0
    """The most GiB of tensors in one file; more go into several files with an index."""

    @property
    def chosen_method(self) -> str:
        """The method's name. Raises ValueError for one that cannot be, or has nothing to do."""
        is_idle = not self.target.fraction and self.target.bits is None
        idle = "where --sparsity is 0" if is_idle else None
        return chosen_method(self.method, idle=idle)

    @property
    def target(self) -> Compression:
        """What to compress to. Raises ValueError for what cannot be."""
        if self.sparsity is None and self.pattern is None and self.bits is None:
            raise ValueError(
                "nothing says what to compress to: give --sparsity, --pattern or --bits."
            )
        pattern = None
        if self.pattern is not None:
            match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.pattern)
            if match is None:
                raise ValueError(f"--pattern is {self.pattern!r}: give N:M, such as 2:4.")
            pattern = int(match[1]), int(match[2])
        for name in ("scope", "block"):
            if getattr(self, name) is not None and not self.sparsity:
                raise ValueError(
                    f"--{name} is given without --sparsity above 0: give both or neither."
                )
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("--pattern is given beside --sparsity: give one or the other.")
        try:
            return Compression(
                sparsity=self.sparsity or 0.0,
                pattern=pattern,
                bits=self.bits,
                scope=self.scope or "global",
                block=1 if self.block is None else self.block,
            )
        except ValueError as error:
            names = ("sparsity", "pattern", "bits", "scope", "block")
            raise ValueError(f"{with_flag(quoted(error), names)}.") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Compress as ``argv`` says. Exits with 2, in one sentence, on a user's mistake."""
    with one_sentence_at_the_end("nothing was written"):
        flags = parse_compress_flags(argv)
        try:
            _compress(flags)
        except (ValueError, OSError) as error:
            raise UserError(sentence(error)) from None


def parse_compress_flags(argv: Sequence[str] | None = None) -> CompressFlags:
    """The flags of the command that compresses, in ``argv``.

    Raises UserError for a mistake, SystemExit(0) after ``--help``.
    """
    flags = one_sentence(lambda: tyro.cli(CompressFlags, args=argv))
    try:
        _ = flags.target, flags.chosen_method
    except ValueError as error:
        raise UserError(str(error)) from None
    check_streaming(flags.max_file_gib)
    return flags


def _compress(flags: CompressFlags) -> None:
    from rich.console import Console

    from qsdp.export import export_compressed
    from qsdp.train.trained_model import open_trained_model

    return_freed_memory()
    source = open_trained_model(flags.checkpoint)
    if source.target is not None:
        raise ValueError(
            f"{source.path} is compressed already ({source.target}): name a training checkpoint."
        )
    of_run = source.config.compression.patterns
    patterns = of_run if flags.prunable is None else flags.prunable.split(",")
    console = Console()
    with streaming_bar(console) as progress:
        facts = export_compressed(
            source.path,
            source.size,
            flags.target,
            flags.out,
            patterns=patterns,
            method=flags.chosen_method,
            file_bytes=round(flags.max_file_gib * GIB),
            progress=progress,
        )
    by = by_method(flags.chosen_method)
    console.print(
        f"{source.path} compressed to {flags.target}{by}: {_zeros_of(facts, 'prunable')} of the "
        f"prunable weights, {_zeros_of(facts, 'model')} of all are 0; the model is in {flags.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _zeros_of(facts: dict[str, Any], part: str) -> str:
    counts = facts["zeros"][part]
    return f"{counts['zeros'] / counts['values']:.2%}"
