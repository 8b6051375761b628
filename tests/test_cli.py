"""Mistakes at the command line of a world of one: one sentence, exit status 2, no traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from qsdp.train.cli import main
from tests.bad_inputs import DATA, FLAGS, TEXT, BadInput

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not dist.is_initialized()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def refused(flags: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that `main` prints on standard error for `flags`."""
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    printed = capfd.readouterr()
    assert_is_one_sentence(printed.err)
    return printed.err


def assert_is_one_sentence(text: str) -> None:
    assert re.fullmatch(r"error: \S.*\n", text), text
    assert "Traceback" not in text


@pytest.mark.parametrize("bad", FLAGS, ids=lambda bad: bad.name)
def test_a_wrong_flag_is_refused_in_one_sentence(
    bad: BadInput, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bad.said in refused(bad.arguments(text_file.parent), capfd)
    assert os.listdir(text_file.parent) == ["text.txt"]


@pytest.mark.parametrize("bad", DATA, ids=lambda bad: bad.name)
def test_a_wrong_input_is_refused_in_one_sentence(
    bad: BadInput, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = text_file.parent / "out"
    assert bad.said in refused([*bad.arguments(text_file.parent), "--out", str(out)], capfd)
    assert os.listdir(out) == []


def small_run(folder: Path, *flags: str) -> list[str]:
    return [
        *("--data", str(folder / "text.txt"), "--out", str(folder / "out"), "--steps", "2"),
        *("--seq-len", "8", "--batch-size", "2", "--eval-batches", "1", *flags),
    ]


def test_a_resume_from_another_model_is_refused_and_a_finished_run_is_left_alone(
    text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = text_file.parent
    main(small_run(folder))
    files = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert (folder / "out" / "checkpoints" / "step-00000002") in {path.parent for path in files}
    capfd.readouterr()

    main(small_run(folder))
    assert "finished run of 2 steps" in capfd.readouterr().out
    assert "vocab_size" in refused(small_run(folder, "--tokenizer", "byte"), capfd)
    assert "AdamW, not CrAM" in refused(small_run(folder, "--cram"), capfd)
    text_file.write_text(TEXT.replace("q", "Q"))
    assert "another tokenizer" in refused(small_run(folder, "--steps", "4"), capfd)
    assert files == {p: p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_refused(
    text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = text_file.parent
    main(small_run(folder))
    capfd.readouterr()
    shards = next((folder / "out" / "checkpoints").rglob("*.distcp"))
    shards.write_bytes(shards.read_bytes()[:1000])
    assert "step-00000002" in refused(small_run(folder, "--steps", "4"), capfd)


@pytest.mark.parametrize(
    "flags", [["--qsdp-bits", "9"], ["--data", "launch", "--out", "{}/out"]], ids=["flag", "data"]
)
def test_the_program_itself_ends_with_status_2(tmp_path: Path, flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "launch/train_gpt.py", *(flag.format(tmp_path) for flag in flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert_is_one_sentence(done.stderr)
