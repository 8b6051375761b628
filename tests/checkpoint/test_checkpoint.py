"""Checkpoints are whole or absent, and metrics have one line a step."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qsdp import checkpoint
from qsdp.checkpoint import folders, verifying
from qsdp.report.metrics import MetricsWriter
from tests.support.linear_model import make, take_step

pytestmark = pytest.mark.usefixtures("gloo_of_one")


def test_a_loaded_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"note": "é"}, files={"a.txt": "hello"})
    again, again_optimizer = make()
    checkpoint.load(path, again, again_optimizer)
    meta = checkpoint.read_meta(path)
    assert meta.pop("checksums").keys() == {".metadata", "__0_0.distcp", "a.txt"}
    assert meta.pop("checksum").startswith("crc32:")
    assert meta == {"note": "é", "step": 1}
    assert (path / "a.txt").read_text() == "hello"
    for pair in ((model, optimizer), (again, again_optimizer)):
        torch.manual_seed(7)
        take_step(*pair)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000100"
    assert checkpoint.latest(tmp_path, until=99) == tmp_path / "step-00000010"
    # A step before others takes nothing of theirs away.
    path = checkpoint.save(tmp_path, 7, model, optimizer, {}, keep=1)
    assert [*checkpoint.steps(tmp_path)] == [7, 10, 100]
    checkpoint.remove(path)
    assert [*checkpoint.steps(tmp_path)] == [10, 100]
    assert len([*tmp_path.iterdir()]) == 2


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    checkpoint.save(tmp_path, 3, model, optimizer, {"run": 1})
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"run": 2})
    assert checkpoint.read_meta(path)["run"] == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, -1])
def test_no_checkpoint_to_keep_is_refused_before_anything_is_written(
    tmp_path: Path, keep: int
) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}: choose 1 or more"):
        checkpoint.save(tmp_path, 1, *make(), {}, keep=keep)
    assert not [*tmp_path.iterdir()]


class PowerCut(BaseException):
    """Not an error that anything could handle."""


@pytest.mark.parametrize("moment", ["clear_killed", "publish", "sync", "remove"])
def test_a_crash_while_saving_leaves_the_last_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)

    def cut(*args: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        if moment in ("sync", "remove"):
            patch.setattr(folders, moment, cut)
        else:
            patch.setattr(f"qsdp.checkpoint.saving.{moment}", cut)
        with pytest.raises(PowerCut):
            checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=1)
    survivor = checkpoint.latest(tmp_path)
    assert survivor == tmp_path / ("step-00000002" if moment == "remove" else "step-00000001")
    checkpoint.load(survivor, *make())
    checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_what_is_no_whole_checkpoint_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "tmp-step-00000009").mkdir()
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.resolve(tmp_path)


def test_a_checkpoint_is_found_from_itself_its_folder_or_the_runs_folder(tmp_path: Path) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    path = checkpoint.save(tmp_path / "checkpoints", 4, model, optimizer, {})
    for given in (path, path.parent, tmp_path):
        assert checkpoint.resolve(given) == path


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    other = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="step-00000001 cannot be loaded"):
        checkpoint.load(path, other, torch.optim.AdamW(other.parameters()))


FILES = ("__0_0.distcp", ".metadata", "a.txt", "meta.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"é": 1}, files={"a.txt": "hello"})
    whole = (path / name).read_bytes()
    places = range(len(whole)) if name == "meta.json" else [0, len(whole) // 2, len(whole) - 1]
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in places]
    other, other_optimizer = make()
    before = [parameter.clone() for parameter in other.parameters()]

    def is_noticed() -> None:
        with pytest.raises(checkpoint.Damaged, match=f"{name} is damaged") as error:
            checkpoint.load(path, other, other_optimizer)
        assert (error.value.checkpoint, error.value.file) == (path, path / name)

    for damaged in (*flipped, whole[:-1], whole[: len(whole) // 2], b""):
        (path / name).write_bytes(damaged)
        is_noticed()
    (path / name).unlink()
    is_noticed()
    assert all(map(torch.equal, before, other.parameters()))
    (path / name).write_bytes(whole)
    checkpoint.load(path, other, other_optimizer)


def test_a_checkpoint_of_an_older_version_loads(tmp_path: Path) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"a": 1}, files={"a.txt": "hello"})
    meta = checkpoint.read_meta(path)
    del meta["checksum"], meta["checksums"]["a.txt"]
    (path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    checkpoint.load(path, *make())
    # What was read may be given again.
    again = checkpoint.save(tmp_path, 2, model, optimizer, checkpoint.read_meta(path))
    assert checkpoint.read_meta(again)["a"] == 1


@pytest.mark.filterwarnings("ignore:.*which a killed run left, is removed")
@pytest.mark.parametrize("is_rewritten", [True, False])
def test_what_is_damaged_counts_for_nothing_and_goes_when_another_is_there(
    tmp_path: Path, is_rewritten: bool
) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, step, model, optimizer, {}, keep=9)
    damaged = path.with_name(path.name + ".new") if is_rewritten else path
    if is_rewritten:  # the old one is still there
        shutil.copytree(path, damaged)
    (damaged / ".metadata").unlink()
    assert checkpoint.latest(tmp_path) == damaged
    without = {damaged.resolve()}
    step = 3 if is_rewritten else 2
    assert checkpoint.latest(tmp_path, without=without) == checkpoint.steps(tmp_path, without)[step]
    checkpoint.save(tmp_path, 4, model, optimizer, {}, keep=2, damaged=without)
    assert [*checkpoint.steps(tmp_path)] == [step, 4]
    for path in tmp_path.iterdir():
        checkpoint.verify(path)


def test_a_file_that_cannot_be_read_is_refused_but_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path, 1, *make(), {})

    def refuse(file: Path, *_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(file))

    for kind, name in ((Path, "read_bytes"), (verifying, "crc32_of_file")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, refuse)
            with pytest.raises(ValueError, match=r"cannot be read .Input/output") as error:
                checkpoint.check(path)
        assert type(error.value) is ValueError


@pytest.mark.parametrize(
    "given",
    [
        *({"files": {name: ""}} for name in ("../out", "meta.json", ".metadata", "__9_0.distcp")),
        *({"files": {"a.txt": "\ud800"}}, {"meta": {"x": {1, 2}}}, {"keep": 0}),
        *({"step": -1}, {"step": True}, {"files": []}, {"may_appear": None}),
        *({"damaged": given} for given in (None, "step-1", ["step-1"])),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    values: dict[str, Any] = {"step": 1, "meta": {}} | given
    step, meta = values.pop("step"), values.pop("meta")
    with pytest.raises(ValueError, match=f"^({'|'.join(given)})"):
        checkpoint.save(tmp_path / "root", step, *make(), meta, **values)
    assert not (tmp_path / "root").exists()


def test_a_root_may_be_text_and_is_a_path(tmp_path: Path) -> None:
    root: Any = str(tmp_path / "root")
    assert checkpoint.save(root, 1, *make(), {}) == tmp_path / "root" / "step-00000001"
    with pytest.raises(ValueError, match=r"^root is 7"):
        checkpoint.save(7, 1, *make(), {})  # type: ignore[arg-type]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, *make(), {})
    for name in ("step-00000003.new", "best"):
        path = path.rename(tmp_path / name)
        checkpoint.verify(path)
    with pytest.raises(checkpoint.Damaged, match="it is of step 3"):
        checkpoint.read_meta(path.rename(tmp_path / "step-00000009"))


@pytest.mark.parametrize("refused", ["rename", "remove_tree"])
def test_what_only_tidies_fails_no_save_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(path: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    name = {"rename": "_set_aside"}.get(refused, refused)
    checkpoint.save(tmp_path, 1, *make(), {"run": 1})
    with monkeypatch.context() as patch:
        patch.setattr(folders, name, refuse)
        for step in (2, 1):
            with pytest.warns(UserWarning, match="cannot be removed yet .Permission denied"):
                path = checkpoint.save(tmp_path, step, *make(), {"run": 2}, keep=1)
            assert checkpoint.read_meta(path)["run"] == 2
        assert checkpoint.read_meta(checkpoint.steps(tmp_path)[1])["run"] == 2
    checkpoint.save(tmp_path, 3, *make(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_state_is_read_whatever_the_optimizer_was_left_with(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 0, model, optimizer, {})  # before any state
    model["used"].weight.grad = torch.ones(3, 3)
    optimizer.step()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})

    other = torch.optim.AdamW(model.parameters())
    grads = [p.grad for p in model.parameters()]  # of a step that was given up
    checkpoint.load(path, model, other)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(
        other.state[model["used"].weight]["exp_avg"],
        optimizer.state[model["used"].weight]["exp_avg"],
    )
    assert not other.state.get(model["unused"].weight)
    without = torch.optim.SGD(model.parameters())
    with pytest.raises(
        ValueError, match=r"optimizer\.state\.used\.weight\.exp_avg.* would be lost"
    ):
        checkpoint.load(path, model, without)
    assert not without.state


def test_of_two_that_save_one_step_at_once_the_later_one_replaces_the_other(
    tmp_path: Path,
) -> None:
    def another_one() -> None:
        checkpoint.save(tmp_path, 3, *make(), {"run": 1})

    path = checkpoint.save(tmp_path, 3, *make(), {"run": 2}, may_appear=another_one)
    assert checkpoint.read_meta(path)["run"] == 2
    checkpoint.verify(path)
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_process_group_a_sentence_says_so(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, *make(), {})
    dist.destroy_process_group()
    try:
        for call in (
            lambda: checkpoint.save(tmp_path, 2, *make(), {}),
            lambda: checkpoint.load_model(path, make()[0]),
            checkpoint.AsyncSaver,
        ):
            with pytest.raises(RuntimeError, match="there is no process group"):
                call()
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_failure_of_any_kind_on_the_first_rank_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "sync", lambda path: {}["x"])
    with pytest.raises(RuntimeError, match=r"cannot be written .*KeyError.*choose another"):
        checkpoint.save(tmp_path, 1, *make(), {})
    assert list(tmp_path.iterdir()) == []


def test_metrics_keep_one_line_a_step_over_crashes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        for step in range(1, 6):
            metrics.log({"step": step, "loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    with MetricsWriter(path, last_step=3) as metrics:
        assert [line["step"] for line in metrics.history] == [1, 2, 3]
        metrics.log({"step": 4, "loss": float("nan")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] is None
    with pytest.raises(ValueError, match="last_step is -1: choose 0 or more"):
        MetricsWriter(path, last_step=-1)
    with MetricsWriter(path):
        pass
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ['{"step": 1}', '{"step": 1, "loss": "low"}', "[]", '"step"'])
def test_a_line_of_metrics_that_is_not_whole_counts_as_torn(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + '\n{"step": 2, "loss": null}\n')
    with MetricsWriter(path, last_step=2, needed=["loss"]) as metrics:
        assert metrics.history == [{"step": 2, "loss": None}]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsWriter(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events") as metrics:
        metrics.log({"step": 1, "loss": 2.0})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0)]
