"""Which checkpoint a run goes on from, and what has changed since."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qsdp import checkpoint
from qsdp.train.config import TrainConfig
from qsdp.train.results import CHECKPOINTS
from qsdp.train.world import World

# What a run is, and which of it another run may not change: weights and states are of these.
_OF_THE_MODEL = ("model", "tokenizer", "optimizer", "seed", "schedule")
_PARTS = ("model", "tokenizer", "optimizer", "schedule", "data", "settings")
_UNSET = "unset"
_MOST_TOLD = 4

# Settings that change the time or the bytes of a step, beside qsdp's.
_PACE = ("batch_size", "grad_accum", "seq_len", "precision", "replicas", "backend")


def find_checkpoint(
    config: TrainConfig, fingerprint: dict[str, Any]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and what `read_meta` says of it, if there is one.

    Raises ValueError if what is there is not of this run, or not of this model.
    """
    root = config.out_dir / CHECKPOINTS
    own = checkpoint.latest(root)
    if config.resume == "none" or (config.resume == "auto" and own is None):
        return None
    newest = {} if own is None else _read(own)
    if config.resume == "auto":
        assert own is not None
        if differences := _differences(newest, fingerprint, _PARTS):
            raise ValueError(
                f"{own} is of another run, with {_listed(differences)}; give another --out, go on "
                f"from it all the same with --resume {config.out_dir}, or begin anew with --resume "
                "none."
            )
        return own, newest
    if own is None and config.resumes_own:
        return None  # the first start of a command that may be started again with other ranks
    path = checkpoint.resolve(Path(config.resume))
    meta = _read(path)
    if differences := _differences(meta, fingerprint, _OF_THE_MODEL):
        raise ValueError(
            f"{path} cannot be resumed: it was trained with {_listed(differences)}; give the flags "
            "of that run, another --out, or --resume none."
        )
    if meta["step"] > config.steps:
        raise ValueError(
            f"{path} is past the end: {meta['step']} steps are done and --steps is "
            f"{config.steps}; raise --steps, or give another --out."
        )
    if own is None or own.samefile(path):
        return path, meta
    came_of_it = newest["origin"] == checkpoint.identity(path)
    if came_of_it and not _differences(newest, fingerprint, _PARTS):
        return own, newest  # a launcher starts the same command again
    if not path.parent.samefile(root):
        raise ValueError(
            f"--out {config.out_dir} holds another run, of {newest['step']} steps; give another "
            "--out, or remove that folder."
        )
    return path, meta


def _read(path: Path) -> dict[str, Any]:
    """What the trainer keeps with a checkpoint. Raises ValueError if it is not all there."""
    meta = {"history": "", "origin": None} | checkpoint.read_meta(path)
    kinds = {
        "fingerprint": dict,
        "config": dict,
        "world_size": int,
        "pace_since": int,
        "history": str,
        "origin": str | None,
    }
    wire = meta.get("wire", 0)
    is_whole = all(isinstance(meta.get(name, ...), kind) for name, kind in kinds.items())
    if not (is_whole and (wire is None or _is_wire_state(wire))):
        raise ValueError(f"{path} was not written by this job; resume from another checkpoint.")
    return meta


def _is_wire_state(state: object) -> bool:
    return isinstance(state, dict) and all(
        isinstance(state.get(name), int) for name in ("seed", "step", "reduced")
    )


def _differences(
    meta: dict[str, Any], fingerprint: dict[str, Any], parts: Iterable[str]
) -> list[str]:
    """In which of the `parts` the run of a checkpoint differs: `lr 0.001, not 0.002`."""
    theirs = meta["fingerprint"]
    ours = json.loads(json.dumps(fingerprint))  # as the other one came: tuples are lists there
    found = []
    for part in parts:
        was, now = theirs.get(part), ours.get(part)
        if was == now:
            continue
        if not isinstance(was, dict) or not isinstance(now, dict):
            is_told = part in ("optimizer", "seed")
            found.append(f"{part} {was}, not {now}" if is_told else f"another {part}")
            continue
        names = [n for n in dict.fromkeys([*now, *was]) if was.get(n, _UNSET) != now.get(n, _UNSET)]
        pairs = [f"{n} {was.get(n, _UNSET)}, not {now.get(n, _UNSET)}" for n in names]
        if part != "settings":
            kind = {"schedule": "schedule of masks"}.get(part, part)
            pairs = [f"another {kind} ({_listed(pairs)})"]
        found += pairs
    return found


def _listed(differences: list[str]) -> str:
    rest = len(differences) - _MOST_TOLD
    return "; ".join(differences[:_MOST_TOLD]) + (f"; and {rest} more" if rest > 0 else "")


def is_finished(config: TrainConfig, meta: dict[str, Any]) -> bool:
    """Whether the run has come to its end with the checkpoint of `meta`, and the summary is that
    of its end."""
    try:
        summary = json.loads((config.out_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(summary, dict) or meta["step"] < config.steps:
        return False
    stated = summary.get("steps"), summary.get("history", "")
    return stated == (meta["step"], meta["history"])


def changed(config: TrainConfig, meta: dict[str, Any]) -> list[str]:
    """The settings that are not those of the checkpoint's run."""
    before, after = meta["config"], config.as_dict()
    return [name for name in sorted(before.keys() | after) if before.get(name) != after.get(name)]


def pace_since(config: TrainConfig, world: World, meta: dict[str, Any]) -> int:
    """`Job.pace_since` of a run that goes on from the checkpoint of `meta`."""
    is_like = meta["world_size"] == world.size and not any(
        name in _PACE or name.startswith("qsdp_") for name in changed(config, meta)
    )
    return int(meta["pace_since"] if is_like else meta["step"])
