"""The folders of checkpoints: which there are, and how one comes and goes in one instant.

step-00000500/             whole: made under another name and renamed when all is on disk
    .metadata  *.distcp    torch.distributed.checkpoint: model and optimizer
    meta.json              the step, checksums of those files, and what the run adds
step-00000500.new/         whole too, and newer than the one beside it, whose name it takes next
tmp-.../                   being written or removed; what no process claims is a killed one's
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qsdp.files import claimed_folder, is_file_name, remove_tree, sync, unclaimed

META = "meta.json"
_REWRITTEN = ".new"
_REMOVED = "tmp-old-"
_COMPLETE = re.compile(rf"step-(\d{{8,}})({_REWRITTEN})?")


def steps(root: Path) -> dict[int, Path]:
    """The whole checkpoints in `root` by their step, oldest first."""
    if not root.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in sorted(root.iterdir())  # .new comes after the one that it replaces
        if path.is_dir() and (match := _COMPLETE.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def latest(root: Path, until: float = math.inf) -> Path | None:
    """The newest whole checkpoint in `root`, if any; of those that are no later than `until`."""
    return next((path for step, path in reversed(steps(root).items()) if step <= until), None)


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
    step = meta.get("step") if isinstance(meta, dict) else None
    if type(step) is not int or step < 0:
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


@contextlib.contextmanager
def writing(root: Path, step: int) -> Iterator[Path]:
    """An empty folder to write the checkpoint of `step` into, which goes if it is not published.

    Raises OSError if it cannot be made, or if another process is writing this step.
    """
    folder = root / f"tmp-step-{step:08d}"
    try:
        claim = contextlib.ExitStack()
        claim.enter_context(claimed_folder(folder))
    except BlockingIOError:
        raise OSError(f"another process is writing {folder}") from None
    with claim:
        yield folder


def clear_killed(root: Path) -> list[Path]:
    """Make the folder `root` if there is none; finish or remove what killed writers left in it.

    Returns what was removed, but for what was about to be.
    """
    root.mkdir(parents=True, exist_ok=True)
    left = []
    for path in sorted(path for path in root.iterdir() if path.is_dir()):
        with unclaimed(path) as is_free:  # what another process makes is its own
            if is_free and path.name.startswith("tmp-"):
                remove_tree(path)
                left.append(path)
            elif is_free and path.name.endswith(_REWRITTEN) and _COMPLETE.fullmatch(path.name):
                _settle(path)
    return [path for path in left if not path.name.startswith(_REMOVED)]


def publish(folder: Path, files: Mapping[str, str], keep: int) -> Path:
    """Add the text `files` to what `writing` made and let it take its name, all or nothing.

    Afterwards the oldest checkpoints before it go, until `keep` are left. Later ones stay.
    """
    root, final = folder.parent, folder.with_name(folder.name.removeprefix("tmp-"))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        sync(folder / name)
    sync(folder)
    if final.exists():  # never without one of the two: see `steps`
        rewritten = folder.rename(final.with_name(final.name + _REWRITTEN))
        sync(root)
        _settle(rewritten)
    else:
        folder.rename(final)
    sync(root)
    own = int(final.name.removeprefix("step-"))
    before = [path for number, path in steps(root).items() if number < own]
    for path in before[: max(0, len(before) + 1 - keep)]:
        remove(path)
    return final


def remove(path: Path) -> None:
    """Delete a checkpoint so that no instant shows half of it under its name."""
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        # A name of its own: nobody else renames to it.
        remove_tree(path.rename(path.with_name(f"{_REMOVED}{secrets.token_hex(4)}-{path.name}")))


def _settle(path: Path) -> None:
    """Let a checkpoint that was written again take the place of the old one."""
    final = path.with_name(path.name.removesuffix(_REWRITTEN))
    if final.exists():
        remove(final)
    path.rename(final)
    sync(path.parent)
