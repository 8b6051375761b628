"""benchmarks/saving/crashes.py in small: killed, damaged and starved runs lose nothing.

The matrix would see it if they did.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qsdp.commands.train import main
from tests.support import patience
from tests.support.ends import shorten_ends

pytestmark = pytest.mark.usefixtures("world_of_one")

STEPS = 24


@pytest.fixture(scope="module")
def matrix() -> Any:
    """The modules of the benchmark, as attributes."""
    from benchmarks.saving import crash_folder, crash_jobs, crash_rows, crashes

    class Modules:
        folder, jobs, rows, program = crash_folder, crash_jobs, crash_rows, crashes

    return Modules


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the processes that are killed have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    shorten_ends(patch)
    patch.setattr("qsdp.train.after_training.matmul_flops_per_s", lambda *_: 1e9)


@pytest.fixture(scope="module")
def flags(matrix: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("".join(random.choices("to be or not\n", k=5000)))
    return [*matrix.program.FLAGS, "--data", str(text), "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def whole(
    matrix: Any, flags: list[str], one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        main([*flags, "--out", str(out), "--keep", "6"])
    return matrix.folder.Whole.of(out)


@pytest.fixture
def stage(matrix: Any, flags: list[str], tmp_path: Path, capfd: Any) -> Iterator[Any]:
    """A stage that starts processes only to strike them: other runs are of this process."""

    class Here(matrix.jobs.Stage):  # type: ignore[name-defined]
        def run(self, out: Path, *more: str) -> Any:
            status, _ = 0, capfd.readouterr()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    main([*self.flags, *more, "--out", str(out)])
                except SystemExit as stop:
                    status = int(stop.code or 0)
            printed = capfd.readouterr()
            told = [printed.err, *(f"{warning.message}\n" for warning in warned)]
            return matrix.jobs.Ended(status, printed=printed.out, complaints=["".join(told)])

    with Here(tmp_path, flags, 1, patience.seconds()) as here:
        yield here


def assert_hold(*rows: Any) -> None:
    faults = [f"{row.what}, {row.when}: {'; '.join(row.faults)}" for row in rows if row.faults]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_instant_loses_nothing(
    matrix: Any, stage: Any, whole: Any
) -> None:
    rows = matrix.rows.kills(stage, whole, random.Random(), 2, matrix.program.SAVE_EVERY)
    assert len(rows) == 3
    assert_hold(*rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    # What all kinds come to is the business of tests/checkpoint/test_damaged_checkpoints.py.
    [
        "a flipped byte",
        *(pytest.param(how, marks=pytest.mark.heavy) for how in ("truncated", "missing")),
    ],
)
def test_a_damaged_file_is_found_and_the_checkpoint_before_is_used(
    matrix: Any, stage: Any, whole: Any, how: str
) -> None:
    rows = matrix.rows.damages(stage, whole, random.Random(), [how])
    assert len(rows) >= 4
    assert_hold(*rows)


@pytest.mark.slow
def test_without_an_undamaged_checkpoint_the_command_is_refused(
    matrix: Any, stage: Any, whole: Any, tmp_path: Path
) -> None:
    row = matrix.rows.all_damaged(stage.run, tmp_path / "out", whole, random.Random())
    assert_hold(row)


@pytest.mark.slow
def test_a_read_only_folder_is_refused_until_it_is_none(
    matrix: Any, stage: Any, whole: Any, tmp_path: Path
) -> None:
    if not (os.geteuid() or matrix.folder.can_mount()):
        pytest.skip("root needs mount for it")
    assert_hold(matrix.rows.unwritable(stage.run, tmp_path / "out", whole))


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_and_ends_until_there_is_room(
    matrix: Any, stage: Any, whole: Any
) -> None:
    if not matrix.folder.can_mount():
        pytest.skip("needs root and mount")
    assert_hold(*matrix.rows.full_for_checkpoints(stage, whole))


@pytest.mark.slow
def test_what_is_lost_is_seen(matrix: Any, whole: Any, tmp_path: Path) -> None:
    out, ended = tmp_path / "out", matrix.jobs.Ended(0)
    shutil.copytree(whole.out, out)
    newest = out / "checkpoints" / f"step-{STEPS:08d}"

    def judged() -> Any:
        row = matrix.folder.Row("")
        matrix.folder.judge_end(row, ended, out, whole)
        return row

    assert judged().faults == []
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    step = random.randrange(STEPS)
    for text in (lines[:step] + lines[step + 1 :], [*lines, lines[step]], lines[::-1]):
        (out / "metrics.jsonl").write_text("".join(text))
        assert judged().lost
    (out / "metrics.jsonl").write_text("".join(lines))
    row = matrix.folder.Row("")
    matrix.folder.judge_stopped(row, out, whole, STEPS + 1)
    assert row.lost == [f"the checkpoint of step {STEPS + 1} is gone"]
    shutil.rmtree(newest)
    assert judged().differs
    (out / "checkpoints" / "tmp-step-00000001").mkdir()
    (out / "summary.json").unlink()
    assert len(judged().wrong) == 2


@pytest.mark.parametrize(
    ("printed", "complaint", "is_lost"),
    [
        ("Going on from a run/checkpoints/step-00000008, 8 of 24", "", False),
        ("Going on from a run/checkpoints/step-00000004, 4 of 24", "", True),
        ("Going on from a/step-00000004, 4", "a/step-00000008 is damaged", False),
        ("tiny: 1 parameters, results in out", "", True),
        ("", "error: refused", False),
    ],
)
def test_an_older_checkpoint_is_taken_aloud(
    matrix: Any, printed: str, complaint: str, is_lost: bool
) -> None:
    row = matrix.folder.Row("")
    end = matrix.jobs.Ended(0, printed=printed + "\n", complaints=[complaint + "\n"])
    matrix.folder.judge_start(row, end, 8)
    assert bool(row.lost) == is_lost


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"kills": 0}, "0"),
        ({"jobs": 0}, "0"),
        ({"patience_s": -1.0}, "-1.0"),
        ({"parts": ("floods",)}, "'floods'"),
    ],
)
def test_the_matrix_refuses_what_it_cannot_run_in_one_sentence(
    matrix: Any, tmp_path: Path, capsys: Any, option: dict[str, Any], named: str
) -> None:
    options = matrix.program.Options(out=tmp_path / "out", **option)
    assert matrix.program.main(options) == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1


def test_a_fault_in_any_row_is_counted(matrix: Any) -> None:
    kinds = ("lost", "hangs", "differs", "wrong")
    rows = [
        {kind: [] for kind in kinds},
        *({k: [] for k in kinds} | {kind: ["x"]} for kind in kinds),
    ]
    totals = matrix.program.totals_of([{"rows": rows[:2]}, {"rows": rows[2:]}])
    assert totals == {"rows": 5} | dict.fromkeys(kinds, 1)
