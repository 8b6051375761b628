"""A file is the old one or the new one, whatever ends a process or fills the disk."""

from __future__ import annotations

import contextlib
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.common import atomic_files, json_files
from qsdp.data.tokenize_corpus import prepare_shards
from qsdp.export import export_compressed
from qsdp.models.huggingface.weights import export_huggingface, load_huggingface
from qsdp.report import plots
from qsdp.report.metrics import MetricsWriter
from qsdp.sparsity.compression_target import Compression
from qsdp.train import evaluate_targets
from tests.support.file_operations import (
    Tree,
    count_operations,
    debris,
    full_disk,
    put_back,
    states,
    tree,
)
from tests.support.huggingface_models import our_model, their_model
from tests.support.short_history import short_history, short_summary
from tests.support.small_gpt import SIZE, save_model
from tests.support.valued_checkpoints import save, save_beside, value_of, values

pytestmark = pytest.mark.filterwarnings("ignore:.*which a killed run left, is removed")

_FEW = 10


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclass
class Case:
    """Something that is written into a folder."""

    before: Callable[[Path], object]
    """Makes what is in the folder."""
    work: Callable[[Path], object]
    refusal: type[Exception] | tuple[type[Exception], ...] = OSError
    """What a full disk makes of ``work``."""
    show: Callable[[Path], Any] = tree
    """What is to be as if nothing had happened, once ``work`` is done again."""
    is_whole: Callable[[Path], object] = lambda folder: True
    """Raises, or is false, for what is neither the old nor the new."""
    is_replaced: bool = True
    """Whether each file is the old one or the new one, byte for byte."""
    may_go_on: bool = False
    """Whether ``work`` may do without a part of it."""


def assert_every_kill_leaves_old_or_new(folder: Path, case: Case) -> None:
    """Whatever ends ``work`` early, what it leaves is whole.

    The same ``work`` then leaves what an undisturbed one leaves, and nothing else.
    """
    old, new = _prepared(folder, case)
    seen: set[tuple[str, ...]] = set()
    for state in states(folder, lambda: case.work(folder)):
        put_back(folder, state.content)
        names = tuple(state.content)
        try:
            _assert_old_or_new(folder, case, state.content, old, new)
            if names not in seen:  # what a torn file lacks changes nothing that is done next
                seen.add(names)
                case.work(folder)
                _assert_is(folder, case, new)
        except Exception as error:
            raise AssertionError(f"{state.when}: {sorted(state.content)}") from error


def assert_a_full_disk_leaves_old_or_new(folder: Path, case: Case) -> None:
    """Whichever operation finds no room, one exception says so.

    Where ``work`` may go on, it is a warning or a line on standard error. What is there is whole,
    and no room is taken; once there is room, ``work`` leaves what an undisturbed one leaves. Every
    operation of a save, some of the rest.
    """
    old, new = _prepared(folder, case)
    start = tree(folder)
    seen: set[tuple[str, ...]] = set()
    count = count_operations(folder, lambda: case.work(folder))
    numbers = range(1, count + 1)
    for number in numbers if case.show is values else random.sample(numbers, min(_FEW, count)):
        put_back(folder, start)
        try:
            with (
                full_disk(folder, number),
                contextlib.redirect_stderr(io.StringIO()) as said,
                warnings.catch_warnings(record=True) as warned,
            ):
                warnings.simplefilter("always")
                try:
                    case.work(folder)
                except case.refusal as error:
                    said.write(str(error))
                else:
                    assert case.may_go_on
            assert "No space left" in said.getvalue() + "".join(str(w.message) for w in warned)
            content = tree(folder)
            names = tuple(content)
            # Whole checkpoints keep these names until there is a newer one.
            left = debris(folder)
            assert [name for name in left if not name.endswith(".new")] == []
            _assert_old_or_new(folder, case, content, old, new)
            if names not in seen:
                seen.add(names)
                case.work(folder)
                _assert_is(folder, case, new)
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"no room for operation {number} of {count}") from error


def _prepared(folder: Path, case: Case) -> tuple[Tree, tuple[Tree, Any]]:
    """What the folder holds before ``work``, which it does again now, and what it holds after."""
    folder.mkdir()
    case.before(folder)
    old = tree(folder)
    case.work(folder)
    assert not debris(folder)
    new = tree(folder), case.show(folder)
    put_back(folder, old)
    return old, new


def _assert_old_or_new(
    folder: Path, case: Case, content: Tree, old: Tree, new: tuple[Tree, Any]
) -> None:
    assert case.is_whole(folder)
    if case.is_replaced:
        left = set(debris(folder))
        for name, data in content.items():
            if not {name, *map(str, Path(name).parents)} & left:
                allowed = [each[name] for each in (old, new[0]) if name in each]
                assert data in allowed, f"{name} is neither the old nor the new one"


def _assert_is(folder: Path, case: Case, new: tuple[Tree, Any]) -> None:
    assert not debris(folder)
    assert case.show(folder) == new[1]


def saved(before: tuple[int, ...], step: int, keep: int, how: Callable[..., None] = save) -> Case:
    """A checkpoint beside others."""

    def fill(folder: Path) -> None:
        for old in before:
            save(folder, old, float(old), keep=9)

    def is_whole(folder: Path) -> bool:
        found = checkpoint.latest(folder)
        if found is None:
            return not before
        return value_of(found) in (float(max(before, default=0)), 40.0)

    def work(folder: Path) -> None:
        how(folder, step, 40.0, keep)

    # Old ones may have to stay for a while.
    return Case(fill, work, RuntimeError, values, is_whole, False, True)


CHECKPOINTS = {
    "the first": saved((), 4, 1),
    "over the last": saved((3,), 4, 1),
    "over several": saved((1, 2, 3), 4, 2),
    "once more": saved((3, 4), 4, 2),
}
BESIDE = {"beside training": saved((3,), 4, 1, save_beside)}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", [*CHECKPOINTS, *BESIDE])
def test_a_save_that_ends_anywhere_leaves_the_last_checkpoint_or_the_new_one(
    tmp_path: Path, name: str
) -> None:
    assert_every_kill_leaves_old_or_new(tmp_path / "root", (CHECKPOINTS | BESIDE)[name])


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_save_without_room_leaves_the_last_checkpoint_or_the_new_one(
    tmp_path: Path, name: str
) -> None:
    assert_a_full_disk_leaves_old_or_new(tmp_path / "root", CHECKPOINTS[name])


def nothing(folder: Path) -> None:
    pass


def files_written(folder: Path) -> None:
    atomic_files.write_text(folder / "a.txt", "new é\n" * 9)
    json_files.write_json(folder / "b.json", {"new": [1.0]})
    with atomic_files.replacing(folder / "c.bin") as temporary:
        temporary.write_bytes(bytes(20_000))


def files_before(folder: Path) -> None:
    for name in ("a.txt", "b.json", "c.bin"):
        (folder / name).write_text("old")


def metrics_written(folder: Path) -> None:
    with MetricsWriter(folder / "metrics.jsonl", last_step=2) as metrics:
        metrics.log({"step": 3, "loss": math.nan})
        metrics.sync()


def metrics_before(folder: Path) -> None:
    lines = [f'{{"step": {step}, "loss": {step}.0}}\n' for step in (1, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def metrics_are_whole(folder: Path) -> bool:
    """The lines of done steps are never lost; one that was being written may be torn."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line[:10] for line in lines[:2]] == ['{"step": 1', '{"step": 2']


def shards_prepared(folder: Path) -> None:
    if (folder / "shards").exists():
        return  # it would be refused
    prepare_shards([folder.parent / "text.txt"], folder / "shards", "char", shard_tokens=200)


def shards_are_whole(folder: Path) -> bool:
    found = sorted(path.name for path in (folder / "shards").glob("*"))
    return not found or ("meta.json" in found and "val-00000.bin" in found)


def exported(folder: Path) -> None:
    path = folder.parent / "checkpoints" / "step-00000007"
    if (folder / "out").exists():
        return  # it would be refused
    export_compressed(path, SIZE, Compression(sparsity=0.5), folder / "out", file_bytes=25_000)


def export_is_whole(folder: Path) -> bool:
    found = {path.name for path in (folder / "out").glob("*")}
    needed = {"compression.json", "tokenizer.json", "model.safetensors.index.json"}
    return not found or needed < found


def evaluation_reported(folder: Path) -> None:
    results = {
        "results": [
            {"target": target, "loss": 2.0, "perplexity": None, "zeros": ZEROS}
            for target in (None, "0.5")
        ],
        "split": "val",
        "source": "run",
        "step": 3,
        "tokens": 9,
        "compressed_to": None,
        "compressed_by": None,
        "method": "magnitude",
        "tokens_seen_in_validation": 0,
    }
    evaluate_targets._report(results, folder / "evaluation")


FULL = (ValueError, OSError)
ZEROS = {"prunable": 0.0, "model": 0.0}


def evaluation_before(folder: Path) -> None:
    (folder / "evaluation").mkdir()
    for name in ("evaluation.json", "evaluation.png"):
        (folder / "evaluation" / name).write_text("old")


def plots_written(folder: Path) -> None:
    drawn = plots.write_plots(folder / "plots", short_history(3, 1.0), short_summary(2.0))
    plots.remove_stale(folder / "plots", drawn)


def plots_before(folder: Path) -> None:
    (folder / "plots").mkdir()
    for name in ("loss", "errors"):
        (folder / "plots" / f"{name}.png").write_text("old")


OTHERS = {
    "files": Case(nothing, files_written),
    "files over old ones": Case(files_before, files_written),
    "metrics": Case(nothing, metrics_written, is_replaced=False, may_go_on=True),
    "metrics over old ones": Case(
        metrics_before,
        metrics_written,
        is_whole=metrics_are_whole,
        is_replaced=False,
        may_go_on=True,
    ),
    "token shards": Case(nothing, shards_prepared, FULL, is_whole=shards_are_whole),
    "a compressed model": Case(nothing, exported, FULL, is_whole=export_is_whole),
    "an evaluation": Case(nothing, evaluation_reported, may_go_on=True),
    "an evaluation over an old one": Case(evaluation_before, evaluation_reported, may_go_on=True),
    "plots": Case(nothing, plots_written),
    "plots over old ones": Case(plots_before, plots_written),
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What some cases read; plots are not drawn, which takes long."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    save_model(tmp_path)

    def figure(**_: object) -> Mock:
        return MagicMock(savefig=lambda path, **_: Path(path).write_bytes(b"\x89PNG" * 5))

    monkeypatch.setattr("matplotlib.figure.Figure", figure)
    monkeypatch.setattr("qsdp.report.plots.draw_errors", lambda figure, history: False)


@pytest.mark.usefixtures("world", "inputs")
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_ends_anywhere_leaves_the_old_or_the_new(tmp_path: Path, name: str) -> None:
    assert_every_kill_leaves_old_or_new(tmp_path / "folder", OTHERS[name])


@pytest.mark.usefixtures("world", "inputs")
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_finds_no_room_leaves_the_old_or_the_new(tmp_path: Path, name: str) -> None:
    assert_a_full_disk_leaves_old_or_new(tmp_path / "folder", OTHERS[name])


def exports(kind: str) -> Case:
    """A model for transformers, in place of one of the same configuration."""
    old, new = our_model(), our_model()
    theirs = their_model() if kind == "in parts" else None

    def before(folder: Path) -> None:
        if kind == "one file":
            export_huggingface(old, folder / "out")
        if theirs is not None:
            theirs.save_pretrained(folder / "out", max_shard_size="2KB")
            known.append(_weights(folder / "out"))

    known = [old.state_dict(), new.state_dict()]

    def is_whole(folder: Path) -> bool:
        out = folder / "out"
        if kind == "new" and not out.exists():
            return True
        found = _weights(out)
        return any(all(torch.equal(found[name], each[name]) for name in found) for each in known)

    def work(folder: Path) -> None:
        export_huggingface(new, folder / "out", files={"tokenizer.json": "{}"})

    return Case(before, work, ValueError, is_whole=is_whole)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_huggingface(folder).state_dict()


EXPORTS = ("new", "one file", "in parts")


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_that_ends_anywhere_leaves_the_old_or_the_new_weights(
    tmp_path: Path, kind: str
) -> None:
    assert_every_kill_leaves_old_or_new(tmp_path / "folder", exports(kind))


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_without_room_leaves_the_old_or_the_new_weights(
    tmp_path: Path, kind: str
) -> None:
    assert_a_full_disk_leaves_old_or_new(tmp_path / "folder", exports(kind))
