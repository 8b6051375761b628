"""csrc/ stays easy to enter: short files, and headers that can be included alone."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support import patience

CSRC = Path(__file__).parents[2] / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
HEADERS = [path for path in FILES if path.suffix == ".h"]
NEEDS_CUDA = ("launch.h", "place.h")
NEEDS_FLAGS = {
    "simd_avx2.h": ["-mavx2", "-mbmi2", "-mf16c"],
    "pack_x86.h": ["-mavx2", "-mbmi2"],
    "simd_avx512.h": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mbmi2", "-mf16c"],
}


def test_files_are_short() -> None:
    assert FILES
    lines = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_headers_are_included_once_and_by_their_folder() -> None:
    for path in FILES:
        text = path.read_text()
        assert path.suffix != ".h" or text.count("#pragma once\n") == 1, path
        included = [
            line.split('"')[1] for line in text.splitlines() if line.startswith('#include "')
        ]
        assert len(included) == len(set(included)), path
        ours = [name for name in included if name != "avx512_emulation.h"]
        assert [name for name in ours if not (CSRC / name).is_file()] == [], path
        # Arrows: nothing shared knows a side, and no side the other.
        folder = path.parent.name
        assert {name.split("/")[0] for name in ours} <= {"common", folder}, path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")
def test_every_header_can_be_included_alone() -> None:
    torch_headers = Path(torch.__file__).parent / "include"
    common = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        "-xc++",
        f"-I{CSRC}",
        f"-isystem{torch_headers}",
    ]
    common += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]

    def complaint(header: Path) -> str:
        command = [*common, *NEEDS_FLAGS.get(header.name, []), "-"]
        source = f'#include "{header.relative_to(CSRC)}"\n'
        done = subprocess.run(
            command,
            input=source,
            capture_output=True,
            text=True,
            timeout=patience.seconds(),
            check=False,
        )
        return done.stderr if done.returncode else ""

    is_x86 = platform.machine() in ("x86_64", "AMD64")
    chosen = [
        header
        for header in HEADERS
        if header.name not in NEEDS_CUDA and (is_x86 or header.name not in NEEDS_FLAGS)
    ]
    with ThreadPoolExecutor(2) as pool:
        complaints = [each for each in pool.map(complaint, chosen) if each]
    assert complaints == [], "\n".join(complaints)
