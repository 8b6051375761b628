"""The folders of checkpoints: which there are, and how one comes and goes in one instant.

step-00000500/             whole: made under another name and renamed when all is on disk
    .metadata  *.distcp    torch.distributed.checkpoint: model and optimizer
    meta.json              the step, checksums of those files, and what the run adds
tmp-.../                   being written or removed; whoever finds one may delete it
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qsdp.file_names import is_file_name

META = "meta.json"
_COMPLETE = re.compile(r"step-(\d{8,})")


def steps(root: Path) -> dict[int, Path]:
    """The whole checkpoints in `root` by their step, oldest first."""
    if not root.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in root.iterdir()
        if path.is_dir() and (match := _COMPLETE.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint in `root`, if any."""
    return next(reversed(steps(root).values()), None)


def resolve(path: Path) -> Path:
    """The checkpoint that a user means by `path`: itself, or the newest one in that folder.

    Raises ValueError if there is none.
    """
    if (path / META).is_file():
        return path
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint; give a folder named step-...")
    return found


def read_meta(path: Path) -> dict[str, Any]:
    """What `save` was given as `meta`, with `step` and `checksums`.

    Raises ValueError if it cannot be read, lacks one of these two, or lists what is no file's name.
    """
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path / META} cannot be read ({error}); resume from another checkpoint."
        ) from None
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
        raise ValueError(f"{path / META} states no step; resume from another checkpoint.")
    if not isinstance(meta.get("checksums"), dict):
        raise ValueError(f"{path / META} states no checksums; resume from another checkpoint.")
    for name in meta["checksums"]:
        if not is_file_name(name):
            raise ValueError(
                f"{path / META} lists {name[:100]!r}, which is not the name of a file beside it: "
                "it is refused; resume from another checkpoint."
            )
    return meta


def checksum(path: Path) -> str:
    """CRC-32 of a file, as `crc32:` and eight digits: seconds for a rank's share of a large model.

    It is there to notice what a disk or a copy has damaged, not what someone has forged.
    """
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return f"crc32:{crc:08x}"


def verify(
    path: Path,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] = lambda num_bytes: None,
    how: str = "",
) -> None:
    """Raise ValueError unless this rank's part of the files is as `save` left them.

    `progress` is called with the number of bytes that were just read; `how` ends the message: how
    another checkpoint is named.
    """
    stated = read_meta(path)["checksums"]
    try:
        for name in sorted(stated)[rank::size]:
            if checksum(path / name) != stated[name]:
                raise ValueError(
                    f"{path / name} is damaged: its checksum is not the one in {META}; name an "
                    f"earlier checkpoint{how}"
                )
            progress((path / name).stat().st_size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); name another checkpoint{how}") from None


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; clears what crashes left behind."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("tmp-*"):
        shutil.rmtree(leftover)
    folder = _temporary(root, step)
    folder.mkdir()
    return folder


def publish(root: Path, step: int, files: Mapping[str, str], keep: int) -> Path:
    """Add the text `files` to what `begin` made and let it take its name, all or nothing.

    Afterwards the oldest checkpoints go, until `keep` are left.
    """
    folder, final = _temporary(root, step), root / f"step-{step:08d}"
    for name, text in files.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(folder)
    if final.exists():
        remove(final)
    folder.rename(final)
    sync_folder(root)
    for path in list(steps(root).values())[:-keep]:
        remove(path)
    return final


def remove(path: Path) -> None:
    """Delete a checkpoint so that no instant shows half of it under its name."""
    path = path.rename(path.with_name(f"tmp-old-{path.name}"))
    shutil.rmtree(path)


def clear_after(root: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`, which a run that goes on there will rewrite."""
    for number, path in steps(root).items():
        if number > step:
            remove(path)


def _temporary(root: Path, step: int) -> Path:
    return root / f"tmp-step-{step:08d}"


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk: without this a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
