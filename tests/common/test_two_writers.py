"""Two processes that write one folder: each file is of one of them, and whole."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.checkpoint import folders
from qsdp.common import atomic_files, folder_locks, json_files
from qsdp.data.corpus import load_corpus
from qsdp.data.tokenize_corpus import prepare_shards
from qsdp.export import export_compressed
from qsdp.sparsity.compression_target import Compression
from tests.support.file_operations import Child, barrier, debris, killed, tree
from tests.support.small_gpt import SIZE, save_model
from tests.support.valued_checkpoints import save, values

ROUNDS = 12


def alone(work: Callable[..., object], *args: object) -> object:
    """What ``work`` comes to, in a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return work(*args)
    finally:
        dist.destroy_process_group()


def in_child(work: Callable[..., object], *args: object) -> dict[str, Any]:
    return Child(work, *args).ended()


def at_once(*works: Callable[[], object]) -> list[dict[str, Any]]:
    """What came of processes that begin at the same time."""
    start = barrier(len(works))
    children = [Child(_when_all_are_there, start, work) for work in works]
    return [child.ended() for child in children]


def _when_all_are_there(start: Barrier, work: Callable[[], object]) -> object:
    start.wait()
    return work()


def save_each(root: Path, steps: range, value: float) -> None:
    for step in steps:
        save(root, step, value + step, keep=2)


def saves(root: Path, steps: range, value: float) -> Callable[[], object]:
    return partial(alone, save_each, root, steps, value)


def test_two_runs_save_different_steps_into_one_folder(tmp_path: Path) -> None:
    done = at_once(
        saves(tmp_path, range(2, 2 + 2 * ROUNDS, 2), 0.0),
        saves(tmp_path, range(3, 3 + 2 * ROUNDS, 2), 0.0),
    )
    assert done == [{"result": None}] * 2
    assert not debris(tmp_path)
    for name, value in in_child(alone, values, tmp_path)["result"].items():
        assert value == float(name.removeprefix("step-"))


def test_of_two_runs_that_save_one_step_the_later_one_replaces_the_other(tmp_path: Path) -> None:
    steps = range(5, 5 + ROUNDS)
    done = at_once(saves(tmp_path, steps, 100.0), saves(tmp_path, steps, 200.0))
    assert done == [{"result": None}] * 2
    assert not debris(tmp_path)
    for name, value in in_child(alone, values, tmp_path)["result"].items():
        assert value - int(name.removeprefix("step-")) in (100.0, 200.0)


def test_what_another_run_claims_just_before_its_removal_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removal goes under a claim: of one who has only looked before, nothing would be known."""
    folder = tmp_path / "tmp-step-00000007"
    folder.mkdir()
    refused = []
    remove_tree = folders.remove_tree

    def claimed_now(path: Path) -> None:
        try:
            with atomic_files.unfinished_folder(folder):
                (folder / "theirs").write_text("theirs")
                remove_tree(path)
                assert (folder / "theirs").read_text() == "theirs"
        except BlockingIOError:
            refused.append(path)
            remove_tree(path)

    monkeypatch.setattr(folders, "remove_tree", claimed_now)
    assert folders.clear_killed(tmp_path) == [f"{folder}, which a killed run left, is removed"]
    assert refused == [folder]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_save_waits_for_another_run_that_looks_at_its_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    """Before it is locked it looks like a killed one's, which the other takes a lock to remove."""
    flock = fcntl.flock
    looking: list[threading.Timer] = []

    def locked_by_another_first(descriptor: int, how: int) -> None:
        if not looking:
            (folder,) = tmp_path.iterdir()
            theirs = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)

            def let_go() -> None:
                if is_removed:
                    folder.rmdir()
                os.close(theirs)

            looking.append(threading.Timer(0.05, let_go))
            looking[0].start()
        flock(descriptor, how)

    monkeypatch.setattr(folder_locks.fcntl, "flock", locked_by_another_first)
    try:
        with folders.writing(tmp_path, 7) as folder:
            assert folder.is_dir()
            with folder_locks.unlocked_folder(folder) as is_free:
                assert not is_free
    finally:
        looking[0].join()
    assert not any(tmp_path.iterdir())


def save_and_be_killed(root: Path, at: int) -> None:
    with killed(root, at):
        save(root, 4, 4.0)


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    """What each instant leaves is shown elsewhere; here is a process that really ends."""
    for at in (9, 30):
        assert in_child(alone, save_and_be_killed, tmp_path, at) == {}
        assert checkpoint.latest(tmp_path) is None
        assert "error" not in in_child(alone, save, tmp_path, 4, 40.0)
        assert in_child(alone, values, tmp_path) == {"result": {"step-00000004": 40.0}}
        folders.remove(tmp_path / "step-00000004")


def write_often(path: Path, who: int) -> None:
    for length in range(40):
        json_files.write_json(path, {"who": who, "numbers": [who] * (length * 200)})


def read_often(path: Path) -> int:
    until = time.monotonic() + 1
    count = 0
    while time.monotonic() < until:
        found = json.loads(path.read_text())
        assert set(found["numbers"]) <= {found["who"]}
        count += 1
    return count


def test_a_reader_sees_whole_files_while_two_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    json_files.write_json(path, {"who": 0, "numbers": [0] * 3000})
    writes = [partial(write_often, path, who) for who in (1, 2)]
    *writers, reader = at_once(*writes, partial(read_often, path))
    assert writers == [{"result": None}] * 2
    assert reader.get("result", 0) > 10, reader
    assert set(tree(tmp_path)) == {"a.json"}


IN_USE = ("is being made by another process", "exists already")


def test_of_two_that_prepare_one_folder_one_does(tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, letters in zip(texts, ("ab", "cd"), strict=True):
        path.write_text(letters * 3000)
    for number in range(ROUNDS // 2):
        out = tmp_path / f"shards-{number}"
        done = at_once(
            *(partial(prepare_shards, [path], out, "char", shard_tokens=500) for path in texts)
        )
        assert_one_was_refused(done)
        corpus = load_corpus(str(out), None)
        assert len(corpus.train) + len(corpus.val) == 6000
        assert corpus.vocab_size == 2
    assert not debris(tmp_path)


def save_source(folder: Path) -> None:
    save_model(folder)


def test_of_two_that_export_to_one_folder_one_does(tmp_path: Path) -> None:
    assert "error" not in in_child(alone, save_source, tmp_path)
    path = tmp_path / "checkpoints" / "step-00000007"
    for number in range(ROUNDS // 4):
        out = tmp_path / f"out-{number}"
        chosen = [Compression(sparsity=sparsity) for sparsity in (0.25, 0.5)]
        done = at_once(*(partial(export_compressed, path, SIZE, each, out) for each in chosen))
        assert_one_was_refused(done)
        written = next(each["result"] for each in done if "result" in each)
        assert json.loads((out / "compression.json").read_text()) == written
    assert not debris(tmp_path)


def assert_one_was_refused(done: list[dict[str, Any]]) -> None:
    refused = [each for each in done if "error" in each]
    assert len(refused) == 1, done
    assert refused[0]["error"] == "ValueError", refused
    assert any(text in refused[0]["text"] for text in IN_USE), refused


def test_a_folder_that_another_makes_is_left_alone(tmp_path: Path) -> None:
    with atomic_files.atomic_folder(tmp_path / "out") as inside:
        (inside / "mine").write_text("mine")
        (tmp_path / "text.txt").write_text("ab" * 500)
        with pytest.raises(ValueError, match="is being made by another process"):
            prepare_shards([tmp_path / "text.txt"], tmp_path / "out", "char")
        assert (inside / "mine").read_text() == "mine"
    assert set(tree(tmp_path / "out")) == {"mine"}


def write_once_seen(path: Path, temporary: Path, seen: Path) -> None:
    while not temporary.exists():
        time.sleep(0.001)
    seen.touch()
    atomic_files.write_text(path, "second")


def test_a_writer_waits_for_the_one_before_it(tmp_path: Path) -> None:
    path, temporary, seen = (tmp_path / name for name in ("a.txt", "a.txt.tmp", "seen"))
    child = Child(write_once_seen, path, temporary, seen)
    with atomic_files.replacing(path) as made:
        made.write_text("first")
        while not seen.exists():
            time.sleep(0.001)
        time.sleep(0.05)  # for a writer that does not wait
        assert made.read_text() == "first"
        assert not path.exists()
    assert child.ended() == {"result": None}
    assert path.read_text() == "second"
    assert set(tree(tmp_path)) == {"a.txt", "seen"}


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_a_checkpoint_that_another_run_has_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = folders.remove

    def remove_after_another(path: Path) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(folders, "remove", remove_after_another)
    save(tmp_path, 1, 1.0, keep=1)
    save(tmp_path, 2, 2.0, keep=1)
    assert values(tmp_path) == {"step-00000002": 2.0}
