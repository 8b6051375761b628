"""Mistakes at the command line of a world of one: one sentence, exit status 2, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qsdp.checkpoint.meta_json import sealed
from qsdp.commands.train import main
from qsdp.data.tokenize_corpus import prepare_shards
from tests.support import patience
from tests.support.bad_inputs import DATA, DEEP, FLAGS, TEXT, BadInput
from tests.support.command_line import assert_is_one_sentence, refused, small_run

pytestmark = pytest.mark.usefixtures("world_of_one")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("bad", FLAGS, ids=lambda bad: bad.name)
def test_a_wrong_flag_is_refused_in_one_sentence(
    bad: BadInput, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = bad.arguments(text_file.parent)
    given = os.listdir(text_file.parent)
    assert bad.said in refused(flags, capfd)
    assert os.listdir(text_file.parent) == given


@pytest.mark.parametrize("bad", DATA, ids=lambda bad: bad.name)
def test_a_wrong_input_is_refused_in_one_sentence(
    bad: BadInput, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = text_file.parent / "out"
    assert bad.said in refused([*bad.arguments(text_file.parent), "--out", str(out)], capfd)
    assert os.listdir(out) == []


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``finished_runs(*flags)``: the folder of a ``small_run`` that has ended, trained once."""
    folders: dict[tuple[str, ...], Path] = {}

    def train(*flags: str) -> Path:
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("finished")
            (folders[flags] / "text.txt").write_text(TEXT)
            main(small_run(folders[flags], *flags))
        return folders[flags]

    return train


@pytest.fixture
def finished(
    finished_runs: Callable[..., Path], text_file: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Path]:
    """``finished(*flags)``: the test's folder, with a copy of such a run in it."""

    def copy(*flags: str) -> Path:
        shutil.copytree(finished_runs(*flags) / "out", text_file.parent / "out")
        capfd.readouterr()
        return text_file.parent

    return copy


@pytest.mark.slow
def test_a_resume_from_another_model_is_refused_and_a_finished_run_is_left_alone(
    finished: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    files = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert (folder / "out" / "checkpoints" / "step-00000002") in {path.parent for path in files}

    summary = folder / "out" / "summary.json"
    os.utime(summary, (1, 1))
    main(small_run(folder))
    assert "holds this run, finished after 2 steps" in capfd.readouterr().out
    assert summary.stat().st_mtime > 1  # who waits for the end of this start sees it
    assert "vocab_size" in refused(small_run(folder, "--tokenizer", "byte"), capfd)
    assert "AdamW, not CrAM" in refused(small_run(folder, "--cram"), capfd)
    (folder / "text.txt").write_text(TEXT.replace("q", "Q"))
    assert "another tokenizer" in refused(small_run(folder, "--steps", "4"), capfd)
    assert files == {p: p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_checkpoint_of_something_else_is_refused(
    finished: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished("--qsdp-bits", "8")
    file = folder / "out" / "checkpoints" / "step-00000002" / "meta.json"
    meta = json.loads(file.read_text())
    flags = small_run(folder, "--qsdp-bits", "8", "--steps", "4")
    for part, value in (("wire", {}), ("fingerprint", []), ("config", None), ("world_size", "2")):
        file.write_text(sealed(meta | {part: value}))
        assert "not written by this job" in refused(flags, capfd)
    file.write_text(sealed({name: meta[name] for name in meta if name != "wire"}))
    assert "not written by this job" in refused(flags, capfd)


@pytest.mark.slow
def test_a_named_checkpoint_past_the_end_and_another_seed_are_refused(
    finished: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    path = str(folder / "out" / "checkpoints" / "step-00000002")
    assert "past the end" in refused(small_run(folder, "--steps", "1", "--resume", path), capfd)
    assert "seed 0, not 1" in refused(small_run(folder, "--steps", "4", "--seed", "1"), capfd)


@pytest.mark.slow
@pytest.mark.usefixtures("brief_ends")
def test_a_summary_is_of_the_steps_with_its_own_settings(
    finished: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    out = folder / "out"
    # A line that lacks what every step has is as good as torn.
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text('{"step": 1}\n' + lines[1] + "\n")
    for steps, batch, measured in ((4, 2, 3), (5, 4, 1), (6, 4, 2)):
        flags = ["--steps", str(steps), "--batch-size", str(batch), "--resume", str(out)]
        main(small_run(folder, *flags))
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["steps"], summary["steps_measured"]) == (steps, measured)
    assert "batch_size 2 -> 4" in capfd.readouterr().out


def test_an_interrupt_ends_with_status_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsdp.train.loop.training_loop", interrupt)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 130
    assert re.fullmatch(r"interrupted, and .*\.\n", capfd.readouterr().err)


@pytest.mark.slow
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
        timeout=patience.seconds(),
        check=False,
    )
    assert done.returncode == 2
    assert_is_one_sentence(done.stderr)


@pytest.mark.slow
def test_a_vocabulary_padded_beyond_the_tokenizers_still_ends_with_a_summary(
    text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    prepare_shards([text_file], folder, "byte")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"vocab_size": 512}))
    main(small_run(tmp_path, "--data", str(folder), "--steps", "1"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["sample"]


@pytest.mark.slow
def test_what_is_in_the_way_of_a_plot_does_not_end_the_run(
    text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (text_file.parent / "out" / "plots" / "loss.png").mkdir(parents=True)
    main(small_run(text_file.parent))
    assert "loss.png: Is a directory" in capfd.readouterr().err
    assert (text_file.parent / "out" / "summary.json").exists()


@pytest.mark.parametrize("name", ["plots", "checkpoints", "metrics.jsonl", "summary.json"])
def test_what_is_in_the_way_of_results_is_refused_at_the_start(
    text_file: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path = text_file.parent / "out" / name
    path.parent.mkdir()
    path.mkdir() if "." in name else path.touch()
    assert f"{name}, " in refused(small_run(text_file.parent), capfd)
    assert os.listdir(path.parent) == [name]


def test_a_folder_that_cannot_be_made_is_refused(
    text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused(["--out", str(text_file / "below" / "a file")], capfd)
    assert "cannot be made" in said
    assert "give a folder where you may write" in said


@pytest.mark.parametrize("flag", ["--data", "--config", "--tokenizer"])
def test_a_pipe_is_refused_and_not_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = refused([flag, str(tmp_path / "pipe"), "--out", str(tmp_path / "out")], capfd)
    assert re.search("pipe is (not|neither) a file", said)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the text is the system's")
@pytest.mark.parametrize(
    "program", [["-m", "qsdp"], *([path] for path in sorted((ROOT / "launch").glob("*.py")))]
)
def test_help_for_a_reader_who_has_gone_is_no_error(program: list[str | Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_ends_the_run_in_one_sentence(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    split: str,
) -> None:
    # Where a real run looks at the start, in small: the first ids, and a sample.
    monkeypatch.setattr("qsdp.data.token_shards._CHECKED_IDS", 4)
    monkeypatch.setattr("qsdp.train.setup.agree_on_data", lambda corpus, world: None)
    (tmp_path / "meta.json").write_text('{"dtype": "uint16", "vocab_size": 50}')
    for name in ("train", "val"):
        wrong = 50 if name == split else 0
        ids = np.array([*4 * [0], *96 * [wrong]], dtype="<u2")
        ids.tofile(tmp_path / f"{name}-0.bin")
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path), "--out", str(out), "--steps", "1", "--batch-size", "1"]
    said = refused([*flags, "--seq-len", "8", "--eval-every", "1"], capfd)
    assert f"The {split} split in {tmp_path} holds the token id 50" in said
    assert not (out / "summary.json").exists()


@pytest.mark.slow
def test_a_diverged_run_ends_with_all_its_results(
    text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = text_file.parent
    flags = ["--steps", "4", "--lr", "1e20", "--warmup-steps", "0", "--qsdp-bits", "8"]
    main(small_run(folder, *flags))
    said = capfd.readouterr().out
    assert "not finite" in said
    assert "No sample" in said

    def no_json(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    out = folder / "out"
    summary = json.loads((out / "summary.json").read_text(), parse_constant=no_json)
    assert summary["val_loss"] is None
    assert summary["sample"] is None
    assert summary["one_shot"]["0.5"] is None
    assert (out / "plots" / "loss.png").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("brief_ends")
def test_a_damaged_line_of_metrics_is_as_good_as_torn(finished: Callable[..., Path]) -> None:
    folder = finished()
    metrics = folder / "out" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + DEEP + b"\n")
    main(small_run(folder, "--steps", "3", "--resume", str(folder / "out")))
    assert len(metrics.read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_checkpoint_nested_without_end_is_refused_by_name(
    finished: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    meta = folder / "out" / "checkpoints" / "step-00000002" / "meta.json"
    meta.write_bytes(DEEP)
    assert f"{meta} is damaged" in refused(small_run(folder, "--steps", "3"), capfd)


@pytest.mark.parametrize("counts", [{"train-00000.bin": "many"}, {"val-00000.bin": None}, []])
def test_token_counts_that_are_no_numbers_are_refused(
    text_file: Path, capfd: pytest.CaptureFixture[str], counts: object
) -> None:
    folder = text_file.parent / "shards"
    prepare_shards([text_file], folder, "byte")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"num_tokens": counts}))
    out = str(text_file.parent / "out")
    assert "num_tokens" in refused(["--data", str(folder), "--out", out], capfd)
