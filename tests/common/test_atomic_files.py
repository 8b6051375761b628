"""Files and folders that are whole or absent: what the functions for them refuse and say."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsdp.common.atomic_files import atomic_folder, replacing, write_text
from qsdp.common.json_files import json_value, write_json


@pytest.mark.parametrize("number", [math.nan, math.inf, np.float32("nan"), np.float64("-inf")])
def test_json_has_null_for_what_is_not_finite_wherever_it_stands(
    tmp_path: Path, number: Any
) -> None:
    value = {"a": number, "b": [1.0, (number, {"c": number})], "d": np.int64(3), "e": "inf"}
    expected = {"a": None, "b": [1.0, [None, {"c": None}]], "d": 3, "e": "inf"}
    assert json_value(value) == expected
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == expected


def test_a_link_is_followed_and_a_mount_point_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, target in (("to a folder", "empty"), ("to nothing", "new")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with atomic_folder(tmp_path / name) as inside:
            (inside / "a").write_text("text")
        assert (tmp_path / target / "a").read_text() == "text"
        assert (tmp_path / name).is_symlink()
    with pytest.raises(ValueError, match="mount point: choose a folder in it"):
        atomic_folder(Path("/")).__enter__()


def test_a_disk_without_room_is_named_by_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    said = r"^\S*new cannot be written \(No space left on device\)"
    with pytest.raises(ValueError, match=said), atomic_folder(tmp_path / "new"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "new"):
        (tmp_path / "of the user").read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "no" / "folder"):
        with pytest.raises(OSError) as error:
            write_text(path, "")
        assert error.value.filename == str(path)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_body_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("new\ud800", encoding="utf-8")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
