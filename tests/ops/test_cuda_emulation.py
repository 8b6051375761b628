"""The bodies of the CUDA kernels, codec, changes and rotation, on the host, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience, sanitizers

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-Og", "-g1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What a GPU must inline, a host need not: checked copies of everything in every kernel take g++ a
# minute to compile, calls six seconds.
FLAGS += ["-Dalways_inline=unused"]


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")
def test_kernel_bodies_give_the_bytes_of_the_specification(tmp_path: Path) -> None:
    library = tmp_path / "emulation.so"
    includes = ["-I", str(ROOT / "csrc")]
    source = str(ROOT / "tests/support/cuda_emulation.cpp")
    build = ["g++", *FLAGS, *includes, source, "-o", str(library)]
    subprocess.run(build, check=True, timeout=patience.seconds())
    # Sanitizers write to stderr, which pytest must leave alone.
    tests = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    tests += ["tests/ops/test_codec_kernels.py", "tests/ops/test_sparse_codec.py"]
    tests += ["tests/ops/test_changes_kernels.py", "tests/ops/test_changes_refusals.py"]
    tests += ["tests/ops/test_rotation_kernels.py"]
    tests += ["-k", "emulated and not bad_tensors"]
    done = subprocess.run(
        tests,
        cwd=ROOT,
        env=os.environ
        | {"QSDP_EMULATED_CUDA": str(library), "LD_PRELOAD": sanitizers.runtimes()}
        | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience.seconds(600),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
