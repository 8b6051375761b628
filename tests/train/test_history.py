"""What a history's first checkpoint removes: what is known to be another's, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from qsdp import checkpoint
from qsdp.checkpoint import verifying
from qsdp.train import history as results
from qsdp.train.kept_model import KeptModel
from qsdp.train.world import World
from tests.support.linear_model import make

pytestmark = pytest.mark.usefixtures("gloo_of_one")

OWN, OTHER = "0a0a0a0a", "0b0b0b0b"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Of a history two checkpoints and a dense twin, then the first checkpoint of another one."""
    for folder, step, history in (
        *(("checkpoints", 1, OWN), ("checkpoints", 2, OWN), ("dense-twin", 2, OWN)),
        ("checkpoints", 3, OTHER),
    ):
        checkpoint.save(tmp_path / folder, step, *make(), {"history": history}, keep=9)
    (tmp_path / f"metrics.{OTHER}.jsonl").touch()
    return tmp_path


def there(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.glob("*/step-*"))


def flip(meta: Path) -> None:
    meta.write_bytes(meta.read_bytes().replace(b"history", b"hystory"))


def make_unreadable(meta: Path) -> None:
    meta.unlink()
    meta.mkdir()


TWO = ("checkpoints/step-00000002", "dense-twin/step-00000002")


@pytest.mark.parametrize("spoil", [flip, Path.unlink, make_unreadable])
def test_what_cannot_be_attributed_stays_with_its_run(
    out: Path, spoil: Callable[[Path], None]
) -> None:
    shutil.rmtree(out / "checkpoints" / "step-00000003")
    for name in TWO:
        spoil(out / name / "meta.json")
    before = there(out)
    assert results.commit(out, OWN, 0) == []
    assert there(out) == before


@pytest.mark.parametrize("spoil", [flip, Path.unlink])
def test_a_new_history_says_what_it_removes_as_damaged(
    out: Path, spoil: Callable[[Path], None]
) -> None:
    for name in TWO:
        spoil(out / name / "meta.json")
    removed = results.commit(out, OTHER, 1)
    assert sorted(removed) == [f"{name} (damaged)" for name in TWO]
    assert there(out) == ["checkpoints/step-00000001", "checkpoints/step-00000003"]


def test_what_a_new_history_cannot_read_stays(out: Path) -> None:
    for name in TWO:
        make_unreadable(out / name / "meta.json")
    assert results.commit(out, OTHER, 0) == ["checkpoints/step-00000001"]
    assert there(out) == [TWO[0], "checkpoints/step-00000003", TWO[1]]


def test_what_cannot_be_removed_is_tried_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", refuse)
        with pytest.raises(PermissionError):
            results.commit(out, OTHER, 0)
    assert (out / f"metrics.{OTHER}.jsonl").exists()  # which is how the next start knows
    with monkeypatch.context() as patch:
        patch.setattr("qsdp.checkpoint.folders.remove_tree", refuse)
        results.commit(out, OTHER, 0)
    assert there(out) == ["checkpoints/step-00000003"]
    assert (out / "metrics.jsonl").exists()


def test_what_is_of_the_new_history_stays_whenever_the_rest_goes(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that fails is made up for at the next start, when the run may be at its end."""
    checkpoint.save(out / f"dense-twin.{OTHER}", 3, *make(), {"history": OTHER, "val_loss": 1.5})
    start = results.HistoryStart(OTHER, is_beside=True)
    run = results.HistoryFolder(out, "", start)
    with monkeypatch.context() as patch:
        patch.setattr(results, "_remove_checkpoint", Mock(side_effect=OSError("busy")))
        with pytest.raises(OSError, match="busy"):
            run.settle()
    run.is_beside = True
    assert (twin := run.latest_kept("dense-twin")) is not None
    assert twin.name == "step-00000003"
    (out / "summary.json").write_text(json.dumps({"history": OTHER}))
    assert "summary.json" not in results.commit(out, OTHER, 0)
    assert (out / "summary.json").exists()
    assert there(out) == ["checkpoints/step-00000003", "dense-twin/step-00000003"]


def test_checkpoints_of_versions_that_named_no_history_are_one(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, *make(), {}, keep=9)
    assert results.commit(tmp_path, "", 0) == []


def test_ranks_read_together_what_one_alone_would_read_for_long(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_alone, is_alone = [], [], False
    on_main, checksum = World.on_main, verifying.crc32_of_file

    def alone(world: World, work: Callable[[], Any]) -> Any:
        nonlocal is_alone
        is_alone = True
        try:
            return on_main(world, work)
        finally:
            is_alone = False

    def seen(path: Path) -> str:
        (read_alone if is_alone else read).append(path.parent.relative_to(out))
        return checksum(path)

    monkeypatch.setattr(World, "on_main", alone)
    monkeypatch.setattr(verifying, "crc32_of_file", seen)
    mesh: Any = None
    world = World(0, 1, torch.device("cpu"), "gloo", mesh)
    twin = out / "dense-twin" / "step-00000002"
    outcome: Any = SimpleNamespace(
        latest_kept=lambda folder, damaged: None if damaged else twin, out=out
    )
    kept = KeptModel("dense-twin", world, outcome, set(), Mock())
    assert kept.loss() is None
    assert "states no validation loss" in kept.why_none
    (twin / ".metadata").unlink()
    assert kept.loss() is None
    assert kept.damaged == {twin.resolve()}
    removed, went_on_from = results.recover(out, world)
    assert (len(removed), went_on_from) == (3, 0)
    assert {str(path) for path in read} == {TWO[1], "checkpoints/step-00000003"}
    assert not read_alone
