"""The flags of ``qsdp train``: over a TOML file over the model's preset."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from qsdp.common.flags import flag
from qsdp.common.printing import flush_output, forgiving_output, is_rank_0
from qsdp.common.user_errors import UserError, quoted
from qsdp.methods.registry import (
    FOLDERS_OF_EVERY_RUN,
    check_all_heeded,
    kept_folders,
    replaced,
)
from qsdp.models.registry import preset_defaults
from qsdp.train.config import TrainConfig, groups_from_settings, setting_names
from qsdp.train.config_file import FILE_TYPES, LISTS, OR_AUTO, file_types, read_config_file
from qsdp.train.run_flags import RunFlags
from qsdp.train.wire_flags import AUTO, BITS_OF_ONE_DIRECTION, CHOSEN, WireFlags

T = TypeVar("T")

_NUMBERS: dict[Any, Callable[[str], object]] = {
    int: int,
    int | None: int,
    float: float,
    float | None: float,
    OR_AUTO: lambda text: text if text == AUTO else int(text),
}


_ABOUT = """Train a language model with FSDP2, optionally with a quantized wire (QSDP) and a method
that makes the model compress well, one of those below.

Runs under torchrun, or alone as a world of one."""


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that ``argv`` (sys.argv without the program's name) asks for.

    Raises UserError for what cannot be read, SystemExit(0) after ``--help``.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", nargs="?")
    first.add_argument("--config", nargs="?")
    numbers = {name: hint for name, hint in file_types().items() if hint in _NUMBERS}
    for name in numbers:
        first.add_argument(flag(name), f"--{name}", dest=name, nargs="?")
    known, _ = first.parse_known_args(argv)
    for name, hint in numbers.items():
        _check_number(name, getattr(known, name), hint)
    from_file = {} if known.config is None else read_config_file(Path(known.config))
    given = given_flags(argv)
    _drop_replaced(from_file, given)
    if known.qsdp_bits == AUTO:
        _leave_to_auto(known.config, from_file, given)
    model = known.model or from_file.get("model", RunFlags.model)
    # An unknown model has no defaults; the check comes below, with all other checks.
    settings = _parse_flags(argv, {"model": model} | _defaults_of(model) | from_file)
    try:
        config = TrainConfig.of(**settings)
        check_all_heeded(config.methods, given)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        _check_files(config)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"a path cannot be read ({quoted(error)}): give another.") from None
    return config


def _defaults_of(model: str) -> dict[str, Any]:
    """The settings for which the preset ``model`` has defaults of its own.

    Raises ValueError for a name that no setting has.
    """
    defaults = preset_defaults().get(model, {})
    if odd := sorted(defaults.keys() - file_types().keys()):
        raise ValueError(
            f"the model preset {model} has a default for {odd[0]!r}, which is not a setting: name "
            "one that --help lists, with underscores."
        )
    return defaults


def given_flags(argv: Sequence[str] | None) -> list[str]:
    """The fields whose flags stand in ``argv``, whatever their values."""
    texts = sys.argv[1:] if argv is None else argv
    names = (text[2:].partition("=")[0].replace("-", "_") for text in texts if text[:2] == "--")
    return [name.removeprefix("no_") for name in names]


def _drop_replaced(from_file: dict[str, Any], given: Sequence[str]) -> None:
    """Take out of a file's settings those that the flags ``given`` take the place of."""
    # By flag, what it would leave without effect, or what would leave it without.
    instead: dict[str, tuple[str, ...]] = {"qsdp_bits": BITS_OF_ONE_DIRECTION}
    for pair in replaced().items():
        instead |= {pair[0]: pair[1:], pair[1]: pair[:1]}
    both = {*BITS_OF_ONE_DIRECTION}
    if both & {*given} and both <= {*given, *from_file}:
        from_file.pop("qsdp_bits", None)
    for name in given:
        for other in instead.get(name, ()):
            from_file.pop(other, None)


def _leave_to_auto(path: str, from_file: dict[str, Any], given: Sequence[str]) -> None:
    """Take out of a file's settings what --qsdp-bits auto chooses, where a run has it chosen so.

    Raises UserError for others of the wire, which would be lost.
    """
    for name in CHOSEN:
        from_file.pop(name, None)
    for name in setting_names(WireFlags):
        if name not in given and from_file.get(name, False) is not False:
            raise UserError(
                f"--config {path} sets {name}, beside --qsdp-bits {AUTO}, which decides on all of "
                "the wire: take it out of the file, or give bits."
            )


def _parse_flags(argv: Sequence[str] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """All settings, by name: those in ``argv``, and the ``defaults`` for what is not there."""
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

    filled = groups_from_settings(defaults)
    told = "TOML file of these settings, as written to OUT/config.toml; flags win over it."
    command = make_dataclass(
        "CommandLine",
        [
            (
                "config",
                Annotated[Path | None, tyro.conf.arg(help=told)],
                field(default=None),
            ),
            *((key, type(group), field(default=group)) for key, group in filled.items()),
        ],
        kw_only=True,
        frozen=True,
    )
    found: Any = one_sentence(
        lambda: tyro.cli(
            command,
            args=argv,
            description=_ABOUT,
            registry=registry,
            # Of each group tyro would look for a comment in the source of a class that has none.
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    )
    return {k: v for key in filled for k, v in getattr(found, key).values().items()}


def one_sentence(read_flags: Callable[[], T]) -> T:
    """What a call of tyro's reads. Raises UserError for what it refuses, SystemExit after --help.

    A reader of the help who has seen enough, as ``head`` has, is no error. Rank 0 alone shows it.
    """
    complaint = io.StringIO()
    help_goes_to = (
        contextlib.nullcontext() if is_rank_0() else contextlib.redirect_stdout(io.StringIO())
    )
    try:
        with forgiving_output(), contextlib.redirect_stderr(complaint), help_goes_to:
            return read_flags()
    except SystemExit as stop:
        if stop.code:
            raise UserError(_first_paragraph(complaint.getvalue())) from None
        flush_output()
        raise


def with_flag(text: str, names: Collection[str]) -> str:
    """``text``, in which a flag stands for one of the settings ``names`` that it begins with."""
    name = text.partition(" ")[0]
    return text.replace(name, flag(name), 1) if name in names else text


def check_one_process() -> None:
    """Raise UserError where a launcher has started several ranks of a command that is for one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("this command is one process: start it without torchrun.")


def _check_number(name: str, text: str | None, hint: Any) -> None:
    if text is None:  # not given, or without a value, which tyro says best
        return
    try:
        _NUMBERS[hint](text)
    except ValueError:
        raise UserError(f"{flag(name)} is {text!r}: give {FILE_TYPES[hint][1]}.") from None


def _first_paragraph(boxed: str) -> str:
    """The sentence at the top of a box that tyro draws."""
    lines = [line.strip("│ \n") for line in boxed.splitlines()[1:]]
    is_end = [not line or re.fullmatch("[─╰╯]+", line) is not None for line in lines]
    text = " ".join(lines[: is_end.index(True)] if True in is_end else lines)
    said = f" ({quoted(text)})" if text else ""
    return f"the command line cannot be read{said}: see --help, which explains each flag."


def _check_files(config: TrainConfig) -> None:
    """Raise UserError for inputs that are not there, before anything is loaded."""
    data = config.data.data
    if data != "stdlib" and not (Path(data).is_file() or Path(data).is_dir()):
        state = "is neither a file nor a folder" if Path(data).exists() else "does not exist"
        raise UserError(
            f"--data {data} {state}: give stdlib, a file of text, JSONL (.jsonl, "
            ".jsonl.gz) or parquet (.parquet), or a folder of token shards."
        )
    tokenizer = config.data.tokenizer
    if tokenizer not in (None, "char", "byte") and not Path(str(tokenizer)).is_file():
        state = "is not a file" if Path(str(tokenizer)).exists() else "does not exist"
        raise UserError(
            f"--tokenizer {tokenizer} {state}: choose char, byte or a JSON file of the "
            "tokenizers library."
        )
    resume = config.output.resume
    is_named = resume not in ("auto", "none") and not config.resumes_own
    # Where it is there no more, what came of it may be in --out.
    has_begun = (config.out_dir / "checkpoints").exists()
    if is_named and not has_begun and not Path(resume).is_dir():
        raise UserError(
            f"--resume {resume} does not exist: choose auto, none or a checkpoint's folder."
        )
    if config.out_dir.exists() and not config.out_dir.is_dir():
        raise UserError(f"--out {config.out_dir} is a file: give a folder.")
    for name in (*FOLDERS_OF_EVERY_RUN, *kept_folders()):
        if (config.out_dir / name).exists() and not (config.out_dir / name).is_dir():
            raise UserError(
                f"--out {config.out_dir} holds a file named {name}, where a folder is to be made: "
                "move it away, or give another folder."
            )
    for name in ("config.toml", "metrics.jsonl", "summary.json"):
        if (config.out_dir / name).exists() and not (config.out_dir / name).is_file():
            raise UserError(
                f"--out {config.out_dir} holds {name}, which is not a file: move it away, or give "
                "another folder."
            )
