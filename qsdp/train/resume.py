"""Which checkpoint a run goes on from, and what has changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsdp import checkpoint
from qsdp.train.config import TrainConfig
from qsdp.train.world import World

# Settings that change the time or the bytes of a step, beside qsdp's.
_PACE = ("batch_size", "grad_accum", "seq_len", "precision", "replicas", "backend")


def find_checkpoint(config: TrainConfig, fingerprint: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from. Raises ValueError if it is of another model."""
    if config.resume == "none":
        return None
    if config.resume == "auto":
        path = checkpoint.latest(config.out_dir / "checkpoints")
    else:
        path = checkpoint.resolve(Path(config.resume))
    if path is None:
        return None
    meta = checkpoint.read_meta(path)
    theirs: Any = meta.get("fingerprint")
    wire = meta.get("wire", 0)
    is_whole = (
        isinstance(theirs, dict)
        and isinstance(meta.get("config"), dict)
        and isinstance(meta.get("world_size"), int)
        and isinstance(meta.get("pace_since"), int)
        and (wire is None or _is_wire_state(wire))
    )
    if not is_whole:
        raise ValueError(f"{path} was not written by this job; resume from another checkpoint.")
    # Through JSON, as the other one came: tuples are lists there.
    ours = json.loads(json.dumps(fingerprint))
    for part in ours:
        if theirs.get(part) != ours[part]:
            raise ValueError(
                f"{path} cannot be resumed: it was trained with {_describe(theirs, ours, part)}; "
                "give the flags of that run, another --out, or --resume none."
            )
    is_told = config.resume == "auto" and is_finished(config, meta["step"])
    if meta["step"] > config.steps and not is_told:
        raise ValueError(
            f"{path} is past the end: {meta['step']} steps are done and --steps is "
            f"{config.steps}; raise --steps, or give another --out."
        )
    return path


def _is_wire_state(state: object) -> bool:
    return isinstance(state, dict) and all(
        isinstance(state.get(name), int) for name in ("seed", "step", "reduced")
    )


def _describe(theirs: dict[str, Any], ours: dict[str, Any], part: str) -> str:
    if part == "tokenizer" or not isinstance(theirs.get(part), type(ours[part])):
        return f"another {part}"
    if part in ("optimizer", "seed"):
        return f"{part} {theirs[part]}, not {ours[part]}"
    kind = "schedule of masks" if part == "schedule" else "model"
    differing = [name for name in ours[part] if theirs[part].get(name) != ours[part][name]]
    parts = [f"{name} {theirs[part].get(name)}, not {ours[part][name]}" for name in differing[:3]]
    return f"another {kind} (" + "; ".join(parts) + ")"


def is_finished(config: TrainConfig, steps_done: int) -> bool:
    return steps_done >= config.steps and (config.out_dir / "summary.json").is_file()


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
