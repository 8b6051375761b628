"""meta.json of a checkpoint: what it says, and the seal at its end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsdp.checkpoint.crc32 import crc32_of_bytes
from qsdp.checkpoint.damaged import Damaged
from qsdp.checkpoint.folders import META, step_of
from qsdp.common.atomic_files import is_file_name
from qsdp.common.user_errors import quoted

OWN_CHECKSUM = "checksum"
"""The last entry of meta.json, where all files are listed: the checksum of the text itself.
The checksum is taken with zeros in its own place.
"""
_NO_CHECKSUM = f"crc32:{0:08x}"
_SEAL = re.compile(rf',\n "{OWN_CHECKSUM}": "(crc32:[0-9a-f]{{8}})"\n}}\n'.encode())


def read_meta(path: Path) -> dict[str, Any]:
    """What meta.json of a checkpoint says.

    That is what ``save`` was given as ``meta``, ``step``, ``checksums`` and its own ``checksum``.
    Older versions wrote no ``checksum``, and into ``checksums`` only DCP's files.

    Raises:
        Damaged: It is not as it was written.
        ValueError: It cannot be read, or lists what is no file's name.
    """
    try:
        data = (path / META).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(path, META, "it is missing") from None
    except OSError as error:
        raise ValueError(
            f"{path / META} cannot be read ({error.strerror}): resume from another checkpoint."
        ) from None
    try:
        meta = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, META, f"it is not JSON: {quoted(error)}") from None
    step = meta.get("step") if isinstance(meta, dict) else None
    if type(step) is not int or step < 0:
        raise Damaged(path, META, "it states no step")
    if step_of(path) not in (None, step):
        raise Damaged(path, META, f"it is of step {step}")
    if not isinstance(meta.get("checksums"), dict):
        raise Damaged(path, META, "it states no checksums")
    seal = _SEAL.search(data, max(0, len(data) - 50))
    if seal is not None:
        if seal[1].decode() != _own_checksum(data[: seal.start(1)], data[seal.end(1) :]):
            raise Damaged(path, META, "its checksum is not the one that it states")
    elif [*meta][-1] != "checksums":  # which older versions wrote last
        raise Damaged(path, META, "it does not end with its checksum")
    for name in meta["checksums"]:
        if not is_file_name(name):
            raise ValueError(
                f"{path / META} lists {name[:100]!r}, which is not the name of a file beside it "
                "and is refused: resume from another checkpoint."
            )
    return meta


def lists(meta: Mapping[str, Any], name: str) -> bool:
    """Whether a meta.json that says ``meta`` lists the file ``name``, as far as it lists any.

    Older versions did not list texts.
    """
    return OWN_CHECKSUM not in meta or name in meta["checksums"]


def sealed(meta: Mapping[str, Any]) -> str:
    """The text of meta.json, with the checksum of its own bytes at its end."""
    values = {name: value for name, value in meta.items() if name != OWN_CHECKSUM}
    text = json.dumps({**values, OWN_CHECKSUM: _NO_CHECKSUM}, indent=1) + "\n"
    before, _, after = text.rpartition(_NO_CHECKSUM)
    return before + _own_checksum(before.encode(), after.encode()) + after


def _own_checksum(before: bytes, after: bytes) -> str:
    return crc32_of_bytes(before + _NO_CHECKSUM.encode() + after)
