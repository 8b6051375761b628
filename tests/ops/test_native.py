"""Which kernels serve is said, and never slower ones than were required."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qsdp.ops import native
from qsdp.ops.schema import KERNELS
from tests.support import patience
from tests.support.bad_inputs import TEXT
from tests.support.command_line import small_run
from tests.support.gpu_kernels import NO_GPU

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LIBRARIES = (native.LIBRARY.name, native.CUDA_LIBRARY.name)
OPERATORS = (
    *("encode", "decode", "encode_all", "decode_all", "encode_changes", "apply_changes"),
    *("compact", "expand", "count_digits", "mark_above", "rotate"),
)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch that knows CUDA, an H100, and no CUDA library."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / native.CUDA_LIBRARY.name)
    monkeypatch.setattr(native, "_has_cuda_kernels", False)
    monkeypatch.delenv("QSDP_REQUIRE_NATIVE", raising=False)


def test_what_serves_the_cpu_is_named() -> None:
    before = native.capability()
    try:
        for name in native.available():
            native.use(name)
            assert native.serving(CPU) == name
            assert native.remark(CPU).startswith("SLOW") == (name == native.PYTHON)
            assert name == native.PYTHON or native.remark(CPU) == f"kernels: {name}"
    finally:
        native.use(before)


def test_a_missing_library_is_slow_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)
    assert native.remark(CPU).startswith("SLOW kernels: plain PyTorch's")
    where = native.LIBRARY.parent
    assert f"_qsdp_native.so is not in {where}: install qsdp from a wheel" in native.remark(CPU)


@pytest.mark.usefixtures("with_gpu")
def test_the_cuda_kernels_are_named_by_the_gpu_that_they_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_has_cuda_kernels", True)
    monkeypatch.setattr(native, "_runs_on", lambda device: True)
    assert native.has_cuda_kernels()
    assert native.serving(GPU) == "cuda sm_90"
    assert native.remark(GPU) == "kernels: cuda sm_90"
    monkeypatch.setattr(native, "_runs_on", lambda device: False)
    with pytest.raises(RuntimeError, match=r"has no kernels for this GPU \(sm_90\): install"):
        native.serving(GPU)


@pytest.mark.usefixtures("with_gpu")
def test_python_on_a_gpu_is_said_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not native.has_cuda_kernels()
    assert native.serving(GPU) == native.PYTHON
    assert native.remark(GPU).startswith("SLOW kernels: plain PyTorch's")
    where = native.CUDA_LIBRARY.parent
    assert f"_qsdp_cuda.so is not in {where}: install qsdp from a wheel" in native.remark(GPU)
    monkeypatch.setenv("QSDP_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"QSDP_REQUIRE_NATIVE is 1, but _qsdp_cuda\.so is not"):
        native.serving(GPU)
    assert native.serving(CPU) == native.capability()


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library is required here")
@pytest.mark.skipif(native.CUDA_LIBRARY.exists(), reason="the CUDA library is here")
@pytest.mark.parametrize(
    ("required", "serves"), [("0", "_say_and_serve"), ("1", "_refuse_gpu_tensors")]
)
def test_a_tensor_on_a_gpu_is_refused_where_its_kernels_are_required_but_absent(
    required: str, serves: str
) -> None:
    # A process of its own: what is registered at import stays.
    code = (
        "import torch; made = torch.library.Library; found = {}\n"
        "class Library(made):\n"
        "    def impl(self, name, kernel, key, **more):\n"
        "        if key == 'CUDA': found[name] = kernel.func.__name__\n"
        "        made.impl(self, name, kernel, key, **more)\n"
        "torch.library.Library = Library\n"
        "import qsdp.ops; print(found)"
    )
    command = [sys.executable, "-c", code]
    env = os.environ | {"QSDP_REQUIRE_NATIVE": required}
    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(dict.fromkeys(OPERATORS, serves))
    with pytest.raises(RuntimeError, match=r"QSDP_REQUIRE_NATIVE is 1, but _qsdp_cuda\.so is not"):
        native._refuse_gpu_tensors("cuda", KERNELS["encode"], torch.ones(1), 0)


# A process in which no library of native kernels is found.
PLAIN = """
import pathlib, runpy, sys
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.suffix != ".so" and exists(path)
"""


def run_plain(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "QSDP_REQUIRE_NATIVE"}
    command = [sys.executable, "-c", PLAIN + code, *arguments]
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, timeout=patience.seconds()
    )


@pytest.mark.slow
def test_that_no_compiled_kernels_serve_is_logged_once_at_first_use() -> None:
    done = run_plain(
        "import qsdp, qsdp.ops, torch; out = torch.zeros(3, dtype=torch.bool)\n"
        "print('imported', file=sys.stderr)\n"
        "for _ in range(2): torch.ops.qsdp.mark_above(torch.ones(3), 0, out)\n"
        "print('served', out.tolist(), file=sys.stderr)"
    )
    begun, line, end = done.stderr.splitlines()
    assert (begun, end) == ("imported", "served [True, True, True]")
    assert line.startswith("qsdp: SLOW kernels: plain PyTorch's")
    assert "_qsdp_native.so is not in" in line


@pytest.mark.slow
def test_a_training_without_compiled_kernels_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    done = run_plain(
        "runpy.run_module('qsdp', run_name='__main__')",
        *("train", *small_run(tmp_path, "--steps", "1", "--one-shot", "0.5")),
    )
    assert (done.stdout + done.stderr).count("SLOW") == 1
    assert "  SLOW kernels: plain PyTorch's" in done.stdout


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({}, 1),
        ({"RANK": "8", "LOCAL_RANK": "0"}, 1),
        ({"RANK": "1", "LOCAL_RANK": "1"}, 0),
        ({"RANK": "1"}, 0),
    ],
)
def test_one_rank_of_a_machine_logs_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ranks: dict[str, str],
    said: int,
) -> None:
    monkeypatch.setattr(native, "_library", None)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    for prints_remark in (False, True):
        monkeypatch.setattr(native, "_told", set())
        caplog.clear()
        served: list[Any] = []

        def kernel(*given: Any, served: list[Any] = served, **more: Any) -> None:
            served.append((given, more))

        if prints_remark:
            native.say_no_more()
        for number in range(3):
            native._say_and_serve("cpu", kernel, number, add=True)
        assert served == [((number,), {"add": True}) for number in range(3)]
        is_told = prints_remark and "RANK" not in ranks
        assert len(caplog.messages) == (0 if is_told else said)


@pytest.mark.gpu
@pytest.mark.skipif(not native.has_cuda_kernels(), reason=NO_GPU)
def test_the_gpu_that_is_here_is_named() -> None:
    assert re.fullmatch(r"cuda sm_\d+", native.serving(GPU))
    assert native.remark(GPU) == f"kernels: {native.serving(GPU)}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_clean_removes_every_library() -> None:
    command = ["make", "--dry-run", "clean"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert all(f"qsdp/{name}" in printed.split() for name in LIBRARIES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize("required", ["0", "1"])
def test_a_failed_editable_build_leaves_no_library_of_an_earlier_one(
    tmp_path: Path, required: str
) -> None:
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (tmp_path / "qsdp").mkdir()
    for name in LIBRARIES:
        (tmp_path / "qsdp" / name).touch()
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", "-DSKBUILD_STATE=editable"]
    done = subprocess.run(
        command,
        env=os.environ | {"CXX": "no-compiler", "QSDP_REQUIRE_NATIVE": required},
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert (done.returncode != 0) == (required == "1"), done.stderr
    assert list((tmp_path / "qsdp").iterdir()) == []
