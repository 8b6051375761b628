"""A damaged checkpoint is found before anything is loaded, and the one before it is used, aloud."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qsdp import checkpoint
from qsdp.checkpoint.meta_json import sealed
from qsdp.commands.train import main
from qsdp.train import history
from tests.support.bad_inputs import TEXT
from tests.support.command_line import refused, small_run
from tests.support.ends import Cut, contents, cut, interrupted, shorten_ends

pytestmark = [pytest.mark.usefixtures("world_of_one"), pytest.mark.slow]

FLAGS = ("--steps", "4", "--save-every", "1", "--keep", "9", "--one-shot", "none")
LAST, BEFORE = "step-00000004", "step-00000003"
FILES = ("__0_0.distcp", ".metadata", "tokenizer.json", "meta.json")


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        shorten_ends(patch)
        patch.setattr("qsdp.train.after_training.matmul_flops_per_s", lambda *_: 1e9)
        folder = tmp_path_factory.mktemp("finished")
        (folder / "text.txt").write_text(TEXT)
        main(small_run(folder, *FLAGS))
        yield folder


@pytest.fixture
def folder(finished_once: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """A finished run of four checkpoints, in ``out``."""
    shutil.copytree(finished_once, tmp_path / "run")
    capfd.readouterr()
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 2
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage(folder: Path, *names: str) -> None:
    for name in names:
        flip(folder / "out" / "checkpoints" / name / "__0_0.distcp")


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())


def used_instead(folder: Path, printed: str) -> list[tuple[str, str, str]]:
    """Of each warning: the damaged checkpoint, the one that is used, how many steps are lost."""
    found = re.findall(
        r"^warning: .*(step-\d+)/\S+ is damaged .* from .*(step-\d+) instead, .* (\d+) steps?\.$",
        printed,
        re.MULTILINE,
    )
    assert len(found) == printed.count("warning:")
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", [flip, truncate, Path.unlink])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    folder: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], None], name: str
) -> None:
    out = folder / "out"
    whole = contents(out)
    spoil(out / "checkpoints" / LAST / name)
    main(small_run(folder, *FLAGS))  # the summary is there, but the last step is not
    printed = capfd.readouterr()
    assert used_instead(folder, printed.err) == [(LAST, BEFORE, "1")]
    assert f"as damaged: checkpoints/{LAST}" in printed.out
    # All is as if nothing had happened.
    again = contents(out)
    assert again.keys() == whole.keys()
    weights = [n for n in whole if n.endswith(".distcp")]
    assert {n: again[n] for n in weights} == {n: whole[n] for n in weights}
    main(small_run(folder, *FLAGS))
    assert "finished after 4 steps" in capfd.readouterr().out


def test_a_run_that_ends_again_before_its_next_checkpoint_says_it_again(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(folder, LAST, BEFORE)
    expected = [(LAST, "step-00000002", "2"), (BEFORE, "step-00000002", "1")]
    flags = small_run(folder, *FLAGS, "--save-every", "2")
    for _ in range(2):
        before = kept(folder)
        interrupted(monkeypatch, flags, 4)
        assert used_instead(folder, capfd.readouterr().err) == expected
        assert kept(folder) == before
    assert len((folder / "out" / "metrics.jsonl").read_text().splitlines()) == 3
    main([*flags, "--keep", "2"])  # which holds two whole ones
    assert kept(folder) == ["step-00000002", LAST]
    checkpoint.verify(folder / "out" / "checkpoints" / LAST)


def test_where_all_are_damaged_nothing_is_removed_and_nothing_begins_anew(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out"
    damage(folder, *kept(folder))
    before = contents(out)
    for more in ([], ["--resume", str(out)]):
        said = refused(small_run(folder, *FLAGS, *more), capfd)
        assert f"{out / 'checkpoints' if not more else out} holds no whole checkpoint" in said
        assert contents(out) == before
    interrupted(monkeypatch, small_run(folder, *FLAGS, "--resume", "none"), 2)
    assert kept(folder) == ["step-00000001"]


@pytest.mark.parametrize(
    ("name", "spoil"), [("__0_0.distcp", flip), ("meta.json", flip), ("meta.json", Path.unlink)]
)
def test_a_named_checkpoint_that_is_damaged_is_refused_by_the_newest_whole_one(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], None]
) -> None:
    out = folder / "out"
    damage(folder, LAST)
    named = out / "checkpoints" / "step-00000002"
    spoil(named / name)
    before = contents(out)
    said = refused(small_run(folder, *FLAGS, "--resume", str(named)), capfd)
    assert f"{named / name} is damaged" in said
    assert f"{out / 'checkpoints' / BEFORE} is the newest whole one" in said
    assert contents(out) == before


@pytest.mark.parametrize("place", ["out", "other"])
def test_of_a_named_folder_the_newest_whole_one_is_used(
    folder: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    damage(folder, LAST)
    source = folder / "out"
    if place == "other":
        source = source.rename(folder / "source")
    before = contents(source)
    flags = small_run(folder, *FLAGS, "--steps", "5", "--resume", str(source))
    main(flags)
    assert used_instead(folder, capfd.readouterr().err) == [(LAST, BEFORE, "1")]
    checkpoint.verify(folder / "out" / "checkpoints" / LAST)
    if place == "other":
        assert contents(source) == before
    # The command of a launcher goes on from what came of it.
    damage(folder, "step-00000005")
    main(flags)
    assert used_instead(folder, capfd.readouterr().err) == [("step-00000005", LAST, "1")]
    checkpoint.verify(folder / "out" / "checkpoints" / "step-00000005")


def test_what_cannot_be_read_is_refused_and_not_passed_over(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent.name == LAST:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    before = contents(folder / "out")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"{LAST}/meta.json cannot be read" in refused(small_run(folder, *FLAGS), capfd)
    monkeypatch.undo()
    assert contents(folder / "out") == before


@pytest.mark.parametrize("more", [(), ("--resume", LAST, "--steps", "5"), ("--resume", "none")])
def test_what_cannot_be_read_and_nobody_needs_is_in_nobodys_way(
    folder: Path, more: tuple[str, ...]
) -> None:
    checkpoints = folder / "out" / "checkpoints"
    meta = checkpoints / "step-00000001" / "meta.json"
    if more[1:] == ("none",):
        meta = meta.parents[1] / LAST / "meta.json"
    meta.unlink()
    meta.mkdir()
    main(small_run(folder, *FLAGS, *(str(checkpoints / m) if m == LAST else m for m in more)))
    assert meta.is_dir() or more


def test_a_run_goes_on_where_outdated_things_cannot_be_removed_yet(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, num_tries = history.commit, 2

    def refuse_first(*arguments: Any) -> Any:
        nonlocal num_tries
        num_tries -= 1
        if num_tries >= 0:
            raise PermissionError(13, "Permission denied", "x")
        return commit(*arguments)

    monkeypatch.setattr(history, "commit", refuse_first)
    main(small_run(folder, *FLAGS, "--resume", "none", "--lr", "5e-3"))
    printed = capfd.readouterr()
    assert printed.err.count("cannot be removed yet (x: Permission denied)") == 2
    assert "as outdated now: summary.json" in printed.out
    assert [path.name for path in (folder / "out").glob("metrics*")] == ["metrics.jsonl"]
    for name in kept(folder):
        assert checkpoint.read_meta(folder / "out" / "checkpoints" / name)["config"]["lr"] == 5e-3


def test_a_checkpoint_past_the_end_is_refused_by_auto_too(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "out" / "checkpoints" / LAST
    path = path.rename(path.with_name("step-00000009"))
    (path / "meta.json").write_text(sealed(checkpoint_meta(path, step=9)))
    said = refused(small_run(folder, *FLAGS), capfd)
    assert "step-00000009 is past the end, as 9 steps are done and --steps is 4" in said


def checkpoint_meta(path: Path, **changes: Any) -> dict[str, Any]:
    """What a checkpoint's meta.json states, with ``changes``."""
    found: dict[str, Any] = json.loads((path / "meta.json").read_text())
    return found | changes


def test_a_strangers_settings_steer_no_terminal(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "out" / "checkpoints" / LAST
    meta = checkpoint.read_meta(path)
    del meta["config"]["max_bad_steps"]  # of a version that did not know it
    meta["config"] |= {"\x1b]0;x\n": "\x1b[2J\nrun \u202e"}
    (path / "meta.json").write_text(sealed(meta))
    main(small_run(folder, *FLAGS, "--steps", "5", "--resume", str(folder / "out")))
    (line,) = re.findall(r"^Going on from .*", capfd.readouterr().out, re.MULTILINE)
    assert line.replace("\ufffd", "").isprintable()
    assert "[2J run" in line
    assert "max_bad_steps" not in line


def test_a_damaged_first_checkpoint_of_another_history_replaces_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out"
    with monkeypatch.context() as patch:
        patch.setattr("qsdp.train.job.Job._settle", lambda job: (_ for _ in ()).throw(Cut))
        cut(small_run(folder, *FLAGS, "--resume", "none", "--lr", "5e-3"))
    damage(folder, "step-00000001")
    before = contents(out)
    main(small_run(folder, *FLAGS))
    assert "finished after 4 steps" in capfd.readouterr().out
    assert contents(out) == before
