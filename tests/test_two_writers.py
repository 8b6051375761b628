"""Two processes that write one folder: each file is of one of them, and whole."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qsdp import checkpoint, files
from qsdp.checkpoint import folders
from qsdp.data import load_corpus, prepare_shards
from qsdp.export import export_compressed
from qsdp.sparsity.target import Compression
from tests.file_operations import debris, ended, in_child, killed, tree
from tests.test_compress import SIZE
from tests.test_compress import save as save_model
from tests.test_every_file_operation import save, value_of, values

ROUNDS = 12


def alone(work: Callable[[], object]) -> Callable[[], object]:
    """`work`, in a world of one of its own."""

    def inside() -> object:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return work()

    return inside


def in_two(*works: Callable[[], object]) -> list[dict[str, Any]]:
    """What came of processes that begin at the same time."""
    reader, writer = os.pipe()

    def when_told(work: Callable[[], object]) -> Callable[[], object]:
        def inside() -> object:
            os.close(writer)
            os.read(reader, 1)  # until all of them are there
            return work()

        return inside

    children = [in_child(when_told(work)) for work in works]
    os.close(reader)
    os.close(writer)
    return [ended(child) for child in children]


def saves(root: Path, steps: range, value: float) -> Callable[[], object]:
    def loop() -> list[str]:
        refused = []
        for step in steps:
            try:
                save(root, step, value + step, keep=2)
            except RuntimeError as error:
                refused.append(str(error))
        return refused

    return alone(loop)


def test_two_runs_save_different_steps_into_one_folder(tmp_path: Path) -> None:
    first, second = in_two(
        saves(tmp_path, range(2, 2 + 2 * ROUNDS, 2), 0.0),
        saves(tmp_path, range(3, 3 + 2 * ROUNDS, 2), 0.0),
    )
    assert [first, second] == [{"result": []}, {"result": []}]
    assert not debris(tmp_path)
    ended(in_child(alone(lambda: values_are_of_steps(tmp_path))))


def values_are_of_steps(root: Path) -> None:
    for name, value in values(root).items():
        assert value == float(name.removeprefix("step-"))


def test_of_two_runs_that_save_one_step_one_may_be_refused(tmp_path: Path) -> None:
    save_one = [saves(tmp_path, range(5, 5 + ROUNDS), value) for value in (100.0, 200.0)]
    done = in_two(*save_one)
    for each in done:
        assert "error" not in each, each
        for refusal in each["result"]:
            assert refusal.startswith("a checkpoint cannot be written (")
            assert refusal.endswith("; choose another --out")
    assert not debris(tmp_path)

    def check() -> list[float]:
        return [value_of(path) - int(path.name[5:]) for path in tmp_path.iterdir()]

    assert set(ended(in_child(alone(check)))["result"]) <= {100.0, 200.0}


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
            with files.claimed_folder(folder):
                (folder / "theirs").write_text("theirs")
                remove_tree(path)
                assert (folder / "theirs").read_text() == "theirs"
        except BlockingIOError:
            refused.append(path)
            remove_tree(path)

    monkeypatch.setattr(folders, "remove_tree", claimed_now)
    assert folders.clear_killed(tmp_path) == [folder]
    assert refused == [folder]
    assert not any(tmp_path.iterdir())


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    """What each instant leaves is shown elsewhere; here is a process that really ends."""

    def end(at: int) -> Callable[[], object]:
        def inside() -> None:
            with killed(tmp_path, at):
                save(tmp_path, 4, 4.0)

        return alone(inside)

    for at in (9, 30):
        assert ended(in_child(end(at))) == {}
        assert checkpoint.latest(tmp_path) is None
        again = ended(in_child(alone(lambda: save(tmp_path, 4, 40.0))))
        assert "error" not in again
        assert ended(in_child(alone(lambda: values(tmp_path)))) == {
            "result": {"step-00000004": 40.0}
        }
        folders.remove(tmp_path / "step-00000004")


def test_a_reader_sees_whole_files_while_two_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"who": 0, "numbers": [0] * 3000})

    def write(who: int) -> Callable[[], object]:
        def loop() -> None:
            for length in range(40):
                files.write_json(path, {"who": who, "numbers": [who] * (length * 200)})

        return loop

    def read() -> int:
        until = time.monotonic() + 1
        seen = 0
        while time.monotonic() < until:
            found = json.loads(path.read_text())
            assert set(found["numbers"]) <= {found["who"]}
            seen += 1
        return seen

    *writers, reader = in_two(write(1), write(2), read)
    assert writers == [{"result": None}] * 2
    assert reader.get("result", 0) > 10, reader
    assert set(tree(tmp_path)) == {"a.json"}


IN_USE = ("is being made by another process", "exists already")


def test_of_two_that_prepare_one_folder_one_does(tmp_path: Path) -> None:
    for name, letters in (("a.txt", "ab"), ("b.txt", "cd")):
        (tmp_path / name).write_text(letters * 3000)

    def prepare(name: str, out: Path) -> Callable[[], object]:
        return lambda: prepare_shards([tmp_path / name], out, "char", shard_tokens=500)

    for number in range(ROUNDS // 2):
        out = tmp_path / f"shards-{number}"
        done = in_two(prepare("a.txt", out), prepare("b.txt", out))
        assert_one_was_refused(done)
        corpus = load_corpus(str(out), None)
        assert len(corpus.train) + len(corpus.val) == 6000
        assert corpus.vocab_size == 2
    assert not debris(tmp_path)


def test_of_two_that_export_to_one_folder_one_does(tmp_path: Path) -> None:
    assert "error" not in ended(in_child(alone(lambda: save_model(tmp_path) and None)))
    path = tmp_path / "checkpoints" / "step-00000007"

    def export(sparsity: float, out: Path) -> Callable[[], object]:
        target = Compression(sparsity=sparsity)
        return lambda: export_compressed(path, SIZE, target, out)["target"]

    for number in range(ROUNDS // 4):
        out = tmp_path / f"out-{number}"
        done = in_two(export(0.25, out), export(0.5, out))
        assert_one_was_refused(done)
        done_one = next(each["result"] for each in done if "result" in each)
        assert json.loads((out / "compression.json").read_text())["target"] == done_one
    assert not debris(tmp_path)


def assert_one_was_refused(done: list[dict[str, Any]]) -> None:
    refused = [each for each in done if "error" in each]
    assert len(refused) == 1, done
    assert refused[0]["error"] == "ValueError", refused
    assert any(text in refused[0]["text"] for text in IN_USE), refused


def test_a_folder_that_another_makes_is_left_alone(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "out") as inside:
        (inside / "mine").write_text("mine")
        (tmp_path / "text.txt").write_text("ab" * 500)
        with pytest.raises(ValueError, match="is being made by another process"):
            prepare_shards([tmp_path / "text.txt"], tmp_path / "out", "char")
        assert (inside / "mine").read_text() == "mine"
    assert set(tree(tmp_path / "out")) == {"mine"}


def test_a_writer_waits_for_the_one_before_it(tmp_path: Path) -> None:
    path, temporary, seen = (tmp_path / name for name in ("a.txt", "a.txt.tmp", "seen"))

    def write_second() -> bool:
        while not temporary.exists():
            time.sleep(0.001)
        seen.touch()
        files.write_text(path, "second")
        return True

    child = in_child(write_second)  # before there is a lock that it would inherit
    with files.replacing(path) as made:
        made.write_text("first")
        while not seen.exists():
            time.sleep(0.001)
        time.sleep(0.05)  # for a writer that does not wait
        assert made.read_text() == "first"
        assert not path.exists()
    assert ended(child) == {"result": True}
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
