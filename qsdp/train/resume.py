"""Which checkpoint a run goes on from, and what has changed since."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsdp import checkpoint
from qsdp.checkpoint import Damaged
from qsdp.common.user_errors import UserError, counted
from qsdp.report.summary_json import read_summary
from qsdp.train.auto.choose import is_choice
from qsdp.train.config import TrainConfig
from qsdp.train.history import CHECKPOINTS, HistoryStart
from qsdp.train.lock import process_id
from qsdp.train.verify_together import verify_together
from qsdp.train.wire_flags import AUTO
from qsdp.train.world import World

# What a run is, and which of it another run may not change: weights and states are of these.
_OF_THE_MODEL = ("model", "tokenizer", "optimizer", "seed", "schedule")
_PARTS = ("model", "tokenizer", "optimizer", "schedule", "data", "settings")
_UNSET = "unset"
Fingerprint = Callable[[TrainConfig], dict[str, Any]]
"""Gives all that changes a run's numbers."""
_MOST_TOLD = 4

# What older versions did not write down.
_OLDER: dict[str, Any] = {
    "history": "",
    "origin": None,
    "launch": None,
    "choice": None,
    "went_on_from": 0,
    "skipped_steps": 0,
    "bad_in_row": 0,
}

# Settings that change the time or the bytes of a step, beside qsdp's.
_PACE = ("batch_size", "grad_accum", "seq_len", "precision", "replicas", "backend")


def find_whole_start(
    config: TrainConfig, world: World, fingerprint: Fingerprint
) -> tuple[HistoryStart, list[Damaged]]:
    """Where a run of this configuration begins, and the damaged checkpoints that are passed over.

    The checkpoint to go on from has been read, each file by one rank. A collective. Raises
    UserError as ``find_start``, and for a damaged checkpoint that was named.
    """
    damaged: list[Damaged] = []

    def find() -> HistoryStart | Damaged:
        try:
            return find_start(config, fingerprint, damaged)
        except Damaged as error:
            return error

    while True:
        found = world.on_main(find)
        if isinstance(found, HistoryStart):
            error = None if found.source is None else verify_together(found.source, world)
            if error is None:
                return found, damaged
            found = error
        damaged.append(found)
        if _is_named(config, found.checkpoint):
            raise UserError(f"{found.fact}, {_instead(found, world)}.", is_shared=True)


def told_as_damaged(start: HistoryStart, damaged: Sequence[Damaged]) -> list[str]:
    """What a resume says of damaged checkpoints, a line for each that ``start`` stands in for."""
    if start.source is None or start.meta is None:  # to begin anew was asked for
        return []
    lines = []
    for error in damaged:
        lost = (checkpoint.step_of(error.checkpoint) or 0) - start.meta["step"]
        if lost < 0:  # somewhere else
            continue
        lines.append(
            f"{error.fact}, and the run goes on from {start.source} "
            f"instead, which loses {counted(lost, 'step')}"
        )
    return lines


def _is_named(config: TrainConfig, path: Path) -> bool:
    """Whether --resume names this very checkpoint."""
    is_path = config.output.resume not in ("auto", "none")
    return is_path and os.path.realpath(config.output.resume) == os.path.realpath(path)


def _instead(named: Damaged, world: World) -> str:
    """What to name instead of a damaged checkpoint."""
    folder, without = named.checkpoint.parent, {named.checkpoint.resolve()}
    while path := world.on_main(lambda: checkpoint.latest(folder, without=without)):
        with contextlib.suppress(UserError):  # of one that cannot be read
            if verify_together(path, world) is None:
                return f"but {path} is the newest whole one there: name it by --resume"
        without.add(path.resolve())
    return (
        "and none beside it is whole: bring one back from a copy, or begin anew with --resume none"
    )


def _all_damaged(folder: Path, damaged: Sequence[Damaged]) -> str:
    first = damaged[0]
    return (
        f"{folder} holds no whole checkpoint ({first.file} is damaged: {first.why}), and nothing "
        "was removed: bring one back from a copy, or begin anew with --resume none."
    )


def _but_for(damaged: Sequence[Damaged]) -> str:
    """What a refusal to resume from an older checkpoint begins with."""
    return f"{damaged[0].fact}, and " if damaged else ""


def find_start(
    config: TrainConfig, fingerprint: Fingerprint, damaged: Sequence[Damaged] = ()
) -> HistoryStart:
    """Where a run of this configuration begins, as if ``damaged`` checkpoints were not there.

    Raises Damaged for one that is not among these, ValueError if what is there is not of this run,
    or not of this model.
    """

    def differences_of(meta: dict[str, Any], parts: Iterable[str]) -> list[str]:
        return _differences(meta, fingerprint(with_resumed_choice(config, meta)), parts)

    root = config.out_dir / CHECKPOINTS
    without = {error.checkpoint.resolve() for error in damaged}
    is_taken, own = bool(checkpoint.steps(root)), checkpoint.latest(root, without=without)
    resume = config.output.resume
    named = None if resume in ("auto", "none") else os.path.realpath(resume)
    anew = HistoryStart(secrets.token_hex(4), origin=named, is_beside=is_taken)
    if not is_taken and (named is None or config.resumes_own):
        return anew  # perhaps the first start of a command that may be started again
    if own is None and config.output.resume == "auto":
        raise ValueError(_all_damaged(root, damaged))
    newest = _OLDER
    if own is not None:
        try:
            newest = _read(own)
        except Damaged:
            raise
        except ValueError:
            if config.output.resume == "auto":
                raise
    same = HistoryStart(
        newest["history"], own, newest, newest["origin"], newest["went_on_from"], False, True
    )
    # A launcher starts the same command again: it goes on from what came of it.
    is_again = "step" in newest and (
        newest["origin"] == named if named is not None else newest["launch"] == _restarted_launch()
    )
    if config.output.resume == "auto" or is_again:
        differences = differences_of(newest, _PARTS)
        if not differences:
            _check_steps(config, own, newest)
            return same
        if config.output.resume == "auto":
            raise ValueError(
                f"{_but_for(damaged)}{own} is of another run, with {_in_words(differences)}: give "
                f"another --out, go on from it all the same with --resume {config.out_dir}, or "
                "begin anew with --resume none."
            )
    if named is None:
        return anew
    given = Path(config.output.resume)
    try:
        path = checkpoint.resolve(given, without)
    except ValueError:
        if not damaged:
            raise
        raise ValueError(_all_damaged(given, damaged)) from None
    meta = _read(path)
    if differences := differences_of(meta, _OF_THE_MODEL):
        raise ValueError(
            f"{_but_for(damaged)}{path} cannot be resumed, as it was trained with "
            f"{_in_words(differences)}: give the flags of that run, another --out, or --resume "
            "none."
        )
    _check_steps(config, path, meta)
    has_past = is_taken and path.parent.samefile(root)
    if is_taken and not has_past:
        if own is None:
            raise ValueError(_all_damaged(root, damaged))
        raise ValueError(
            f"--out {config.out_dir} holds another run, with {own.name}: give another --out, or "
            "remove that folder."
        )
    if own is not None and own.samefile(path) and not differences_of(meta, _PARTS):
        return replace(same, origin=named)
    return replace(anew, source=path, meta=meta, went_on_from=meta["step"], has_past=has_past)


def with_resumed_choice(config: TrainConfig, meta: dict[str, Any]) -> TrainConfig:
    """``config`` with what the run to resume chose, where --qsdp-bits auto is to choose."""
    if config.wire.qsdp_bits != AUTO or meta["choice"] is None:
        return config
    return config.resolved(meta["choice"]["settings"])


def _check_steps(config: TrainConfig, path: Path | None, meta: dict[str, Any]) -> None:
    if meta["step"] > config.run.steps:
        raise ValueError(
            f"{path} is past the end, as {meta['step']} steps are done and --steps is "
            f"{config.run.steps}: raise --steps, or give another --out."
        )


def launch_id() -> str | None:
    """By what a run to resume tells torchrun's launches apart, on rank 0: restarts are of one."""
    return process_id(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _restarted_launch() -> str:
    """The launch that has restarted this process by --max-restarts; "" if none has."""
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return (launch_id() or "") if is_restarted else ""


def _read(path: Path) -> dict[str, Any]:
    """What the trainer keeps with a checkpoint. Raises ValueError if it is not all there."""
    meta = _OLDER | checkpoint.read_meta(path)
    kinds = {
        "fingerprint": dict,
        "config": dict,
        "world_size": int,
        "pace_since": int,
        "history": str,
        "origin": str | None,
        "launch": str | None,
        "choice": dict | None,
        "went_on_from": int,
        "skipped_steps": int,
        "bad_in_row": int,
    }
    wire = meta.get("wire", 0)
    is_whole = all(isinstance(meta.get(name, ...), kind) for name, kind in kinds.items())
    is_whole = is_whole and (meta["choice"] is None or is_choice(meta["choice"]))
    if not (is_whole and (wire is None or _is_wire_state(wire))):
        raise ValueError(f"{path} was not written by this job: resume from another checkpoint.")
    return meta


def _is_wire_state(state: object) -> bool:
    return isinstance(state, dict) and all(
        isinstance(state.get(name), int) for name in ("seed", "step", "reduced")
    )


def _differences(
    meta: dict[str, Any], fingerprint: dict[str, Any], parts: Iterable[str]
) -> list[str]:
    """In which of the ``parts`` the run of a checkpoint differs: ``lr 0.001, not 0.002``."""
    theirs = meta["fingerprint"]
    ours = json.loads(json.dumps(fingerprint))  # as the other one came: tuples are lists there
    found = []
    for part in parts:
        was, now = theirs.get(part), ours.get(part)
        if was == now:
            continue
        if not isinstance(was, dict) or not isinstance(now, dict):
            is_told = part in ("optimizer", "seed")
            is_known = part in theirs or part == "schedule"
            unknown = f"{part} that an older version did not write down"
            another = f"another {part}" if is_known else unknown
            found.append(f"{part} {was}, not {now}" if is_told else another)
            continue
        names = [n for n in dict.fromkeys([*now, *was]) if was.get(n, _UNSET) != now.get(n, _UNSET)]
        pairs = [f"{n} {was.get(n, _UNSET)}, not {now.get(n, _UNSET)}" for n in names]
        if part != "settings":
            kind = {"schedule": "schedule of masks"}.get(part, part)
            pairs = [f"another {kind} ({_in_words(pairs)})"]
        found += pairs
    return found


def _in_words(differences: list[str]) -> str:
    rest = len(differences) - _MOST_TOLD
    return "; ".join(differences[:_MOST_TOLD]) + (f"; and {rest} more" if rest > 0 else "")


def is_finished(config: TrainConfig, meta: dict[str, Any]) -> bool:
    """Whether the run has ended with the checkpoint of ``meta``, and the summary is of that."""
    summary = read_summary(config.out_dir)
    found = summary.get("steps"), summary.get("history", "")
    return meta["step"] >= config.run.steps and found == (meta["step"], meta["history"])


def changed(config: TrainConfig, meta: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that are not those of the checkpoint's run: what they were and are."""
    # What an older version did not know was as it is by default.
    before, after = TrainConfig().as_dict() | meta["config"], config.as_dict()
    pairs = {n: (before.get(n, _UNSET), after.get(n, _UNSET)) for n in sorted(before | after)}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def pace_since(config: TrainConfig, world: World, meta: dict[str, Any]) -> int:
    """The ``Job.pace_since`` of a run that goes on from the checkpoint of ``meta``."""
    is_like = meta["world_size"] == world.size and not any(
        name in _PACE or name.startswith("qsdp_") for name in changed(config, meta)
    )
    return int(meta["pace_since"] if is_like else meta["step"])
