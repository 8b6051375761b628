"""The flags of launch/train_gpt.py: over a TOML file over the model's preset."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from qsdp.common.printing import flush_output, forgiving_output
from qsdp.common.user_errors import UserError, sentence
from qsdp.models.registry import presets
from qsdp.train.config import TrainConfig
from qsdp.train.config_file import FILE_TYPES, LISTS, OR_AUTO, read_config_file
from qsdp.train.method_flags import INSTEAD
from qsdp.train.wire_flags import AUTO, BITS_OF_ONE_DIRECTION, CHOSEN, WireFlags

T = TypeVar("T")


# By flag, what it replaces of --config: settings that it would leave without effect, or that would
# leave it without.
_REPLACED = {
    "qsdp_bits": BITS_OF_ONE_DIRECTION,
    **{name: (other,) for pair in INSTEAD.items() for name, other in (pair, pair[::-1])},
}
_NUMBERS: dict[Any, Callable[[str], object]] = {
    int: int,
    int | None: int,
    float: float,
    float | None: float,
    OR_AUTO: lambda text: text if text == AUTO else int(text),
}


@dataclass(frozen=True, kw_only=True)
class CommandLine(TrainConfig):
    """Train a language model with FSDP2, optionally with a quantized wire (QSDP) and a method that
    makes the model compress well: CrAM, AC/DC, gradual pruning.

    Runs under torchrun, or alone as a world of one."""

    config: Path | None = None
    """TOML file of these settings, as written to OUT/config.toml; flags win over it."""

    def __post_init__(self) -> None:
        """Nothing: `parse` validates once all sources are merged."""


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that `argv` (sys.argv without the program's name) asks for.

    Raises UserError for what cannot be read, SystemExit(0) after `--help`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", nargs="?")
    first.add_argument("--config", nargs="?")
    numbers = {name: hint for name, hint in get_type_hints(TrainConfig).items() if hint in _NUMBERS}
    for name in numbers:
        first.add_argument("--" + name.replace("_", "-"), f"--{name}", dest=name, nargs="?")
    known, _ = first.parse_known_args(argv)
    for name, hint in numbers.items():
        _check_number(name, getattr(known, name), hint)
    from_file = {} if known.config is None else read_config_file(Path(known.config))
    given = _given(argv)
    _drop_replaced(from_file, given)
    if known.qsdp_bits == AUTO:
        _leave_to_auto(known.config, from_file, given)
    model = known.model or from_file.get("model", TrainConfig.model)
    # An unknown model has no defaults; the check comes below, with all other checks.
    defaults = CommandLine(**{"model": model} | presets().get(model, {}) | from_file)
    arguments = _parse_flags(argv, defaults)
    values = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig)}
    try:
        config = TrainConfig(**values)
        config.check_all_are_used(given)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        _check_files(config)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"{sentence(error)}; give a path that can be read.") from None
    return config


def _given(argv: Sequence[str] | None) -> list[str]:
    """The fields whose flags stand in `argv`, whatever their values."""
    texts = sys.argv[1:] if argv is None else argv
    names = (text[2:].partition("=")[0].replace("-", "_") for text in texts if text[:2] == "--")
    return [name.removeprefix("no_") for name in names]


def _drop_replaced(from_file: dict[str, Any], given: Sequence[str]) -> None:
    """Take out of a file's settings those that flags ``given`` stand in place of."""
    both = {*BITS_OF_ONE_DIRECTION}
    if both & {*given} and both <= {*given, *from_file}:
        from_file.pop("qsdp_bits", None)
    for name in given:
        for other in _REPLACED.get(name, ()):
            from_file.pop(other, None)


def _leave_to_auto(path: str, from_file: dict[str, Any], given: Sequence[str]) -> None:
    """Take out of a file's settings what --qsdp-bits auto chooses, as a run that it has chosen for
    has them. Raises UserError for others of the wire, which would be lost."""
    for name in CHOSEN:
        from_file.pop(name, None)
    for name in (field.name for field in fields(WireFlags)):
        if name not in given and from_file.get(name, False) is not False:
            raise UserError(
                f"--config {path} sets {name}, beside --qsdp-bits {AUTO}, which decides on all of "
                "the wire; take it out of the file, or give bits."
            )


def _parse_flags(argv: Sequence[str] | None, defaults: CommandLine) -> CommandLine:
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def comma_list(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type not in LISTS:
            return None
        kind = next(t for t in (float, int, str) if t in LISTS[info.type][0])
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar={float: "S,S,...", int: "N,N,...", str: "TARGET,..."}[kind],
            instance_from_str=lambda texts: tuple(kind(s) for s in texts[0].split(",")),
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda value: [
                "None" if value is None else ",".join(s if kind is str else f"{s:g}" for s in value)
            ],
        )

    return one_sentence(
        lambda: tyro.cli(CommandLine, args=argv, default=defaults, registry=registry)
    )


def one_sentence(read_flags: Callable[[], T]) -> T:
    """What a call of tyro's reads. Raises UserError for what it refuses, SystemExit after --help.

    A reader of the help who has seen enough, as `head` has, is no error.
    """
    complaint = io.StringIO()
    try:
        with forgiving_output(), contextlib.redirect_stderr(complaint):
            return read_flags()
    except SystemExit as stop:
        if stop.code:
            raise UserError(_first_paragraph(complaint.getvalue())) from None
        flush_output()
        raise


def _check_number(name: str, text: str | None, hint: Any) -> None:
    if text is None:  # not given, or without a value, which tyro says best
        return
    try:
        _NUMBERS[hint](text)
    except ValueError:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} is {text!r}; give {FILE_TYPES[hint][1]}.") from None


def _first_paragraph(boxed: str) -> str:
    """The sentence at the top of a box that tyro draws."""
    lines = [line.strip("│ \n") for line in boxed.splitlines()[1:]]
    is_end = [not line or re.fullmatch("[─╰╯]+", line) is not None for line in lines]
    text = " ".join(lines[: is_end.index(True)] if True in is_end else lines)
    return f"{text.rstrip('.') or 'The command line cannot be read'}; --help explains each flag."


def _check_files(config: TrainConfig) -> None:
    """Raise UserError for inputs that are not there, before anything is loaded."""
    data = Path(config.data)
    if config.data != "stdlib" and not (data.is_file() or data.is_dir()):
        state = "is neither a file nor a folder" if data.exists() else "does not exist"
        raise UserError(
            f"--data {config.data} {state}; give stdlib, a text file or a folder of token shards."
        )
    tokenizer = config.tokenizer
    if tokenizer not in (None, "char", "byte") and not Path(str(tokenizer)).is_file():
        state = "is not a file" if Path(str(tokenizer)).exists() else "does not exist"
        raise UserError(
            f"--tokenizer {tokenizer} {state}; choose char, byte or a JSON file of the "
            "tokenizers library."
        )
    is_named = config.resume not in ("auto", "none") and not config.resumes_own
    # Where it is there no more, what came of it may be in --out.
    has_begun = (config.out_dir / "checkpoints").exists()
    if is_named and not has_begun and not Path(config.resume).is_dir():
        raise UserError(
            f"--resume {config.resume} does not exist; choose auto, none or a checkpoint's folder."
        )
    if config.out_dir.exists() and not config.out_dir.is_dir():
        raise UserError(f"--out {config.out_dir} is a file; give a folder.")
    for name in ("checkpoints", "plots", "tensorboard"):
        if (config.out_dir / name).exists() and not (config.out_dir / name).is_dir():
            raise UserError(
                f"--out {config.out_dir} holds a file named {name}, where a folder is to be made; "
                "move it away, or give another folder."
            )
    for name in ("config.toml", "metrics.jsonl", "summary.json"):
        if (config.out_dir / name).exists() and not (config.out_dir / name).is_file():
            raise UserError(
                f"--out {config.out_dir} holds {name}, which is not a file; move it away, or give "
                "another folder."
            )
