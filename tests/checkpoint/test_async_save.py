"""A checkpoint that is written beside training is of the moment when it was asked for."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import FileSystemWriter

from qsdp import checkpoint
from qsdp.checkpoint import background
from qsdp.commands.train import main
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.acdc.schedule import ACDCSchedule
from qsdp.train.job import Job
from tests.support import patience
from tests.support.bad_inputs import TEXT
from tests.support.command_line import refused, small_run
from tests.support.file_operations import full_disk, tree
from tests.support.linear_model import make, take_step

WAIT_S = patience.seconds()


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threads = threading.enumerate()
    yield
    assert threading.enumerate() == threads
    assert [*distributed_c10d._world.pg_map] == [dist.group.WORLD]
    dist.destroy_process_group()


@pytest.fixture
def may_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """DCP's thread writes nothing until this is set."""
    event, write_data = threading.Event(), FileSystemWriter.write_data

    def wait_and_write(self: Any, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(WAIT_S)
        return write_data(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_and_write)
    return event


def tied_in_bf16() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Tanh())
    model[1].weight = model[0].weight
    model.register_buffer("count", torch.tensor(3))
    model = model.to(torch.bfloat16)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def masked() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    schedule = ACDCSchedule(steps=10, warmup=1, phase=3, last_dense=3, last_sparse=3)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, ACDC(model, adamw, schedule=schedule, prunable=["0.weight"])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weight = next(model.parameters())
    model(torch.randn(4, weight.shape[1], dtype=weight.dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", [make, tied_in_bf16, masked])
def test_what_is_saved_is_as_it_was_while_training_goes_on(
    tmp_path: Path, may_write: threading.Event, kind: Any
) -> None:
    model, optimizer = kind()
    for _ in range(2):
        step(model, optimizer)
    meta: dict[str, Any] = {"a": [1]}
    checkpoint.save(tmp_path / "now", 1, model, optimizer, meta, files={"a.txt": "hello"})
    with checkpoint.AsyncSaver() as saver:
        saver.save(tmp_path / "beside", 1, model, optimizer, meta, files={"a.txt": "hello"})
        meta["a"].append(2)
        for _ in range(3):
            step(model, optimizer)
        optimizer.param_groups[0]["lr"] = 9.0
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(7)
        (folder,) = (tmp_path / "beside").iterdir()
        assert folder.name.startswith("tmp-step-00000001-")
        may_write.set()
        path = saver.wait()
    assert path == tmp_path / "beside" / "step-00000001"
    checkpoint.verify(path)
    now, beside = tree(tmp_path / "now"), tree(tmp_path / "beside")
    assert now.keys() == beside.keys()
    different = {Path(name).name for name in now if now[name] != beside[name]}
    assert different <= {".metadata", "meta.json"}  # the first holds the folder's name
    metas = [checkpoint.read_meta(tmp_path / n / "step-00000001") for n in ("now", "beside")]
    assert metas[0]["a"] == metas[1]["a"] == [1]


@pytest.mark.usefixtures("world")
def test_a_checkpoint_appears_by_itself_and_old_ones_go(tmp_path: Path) -> None:
    with checkpoint.AsyncSaver() as saver:
        for number in range(1, 5):
            saver.save(tmp_path, number, *make(), {}, keep=2)
        saver._last[0].thread.join()  # without a word to it
        assert [*checkpoint.steps(tmp_path)] == [3, 4]
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.usefixtures("world")
def test_a_failure_beside_training_is_told_at_the_next_save_and_leaves_nothing(
    tmp_path: Path, may_write: threading.Event
) -> None:
    model, optimizer = make()
    take_step(model, optimizer)
    saver = checkpoint.AsyncSaver()
    with full_disk(tmp_path, 1, needs=("write", "fsync")):
        saver.save(tmp_path, 1, model, optimizer, {})
        may_write.set()
        with pytest.raises(RuntimeError, match=r"step 1 cannot be written .*No space") as error:
            saver.save(tmp_path, 2, model, optimizer, {})
    assert "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]
    saver.save(tmp_path, 2, model, optimizer, {})
    assert saver.wait() == tmp_path / "step-00000002"
    assert saver.wait() is None

    def refuse() -> None:
        raise ValueError("it was taken over")

    saver.save(tmp_path, 3, model, optimizer, {}, may_appear=refuse)
    with pytest.raises(ValueError, match=r"^it was taken over$"):
        saver.wait()
    saver.save(tmp_path, 4, model, optimizer, {}, may_appear=refuse)
    with pytest.warns(UserWarning, match="taken over"):
        saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    with pytest.raises(RuntimeError, match="closed"):
        saver.save(tmp_path, 5, model, optimizer, {})


@pytest.mark.usefixtures("world")
def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    model, optimizer = make()
    (tmp_path / "file").write_text("")
    with checkpoint.AsyncSaver() as saver:
        with pytest.raises(RuntimeError, match="cannot be written"):
            saver.save(tmp_path / "file", 1, model, optimizer, {})
        with pytest.raises(ValueError, match=r"^keep is 0"):
            saver.save(tmp_path / "root", 1, model, optimizer, {}, keep=0)
        optimizer.param_groups[0]["extra"] = object()
        with pytest.raises(ValueError, match=r"param_groups\.0\.extra is or holds an object"):
            saver.save(tmp_path / "root", 1, model, optimizer, {})
        assert not [*(tmp_path / "root").iterdir()]
        del optimizer.param_groups[0]["extra"]
        saver.save(tmp_path / "root", 1, model, optimizer, {})


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("fails", [False, True])
def test_copies_are_freed_and_a_dropped_saver_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    copies: list[weakref.ref[Tensor]] = []
    copied = background._copied

    def seen(value: Any, *rest: Any) -> Any:
        copy = copied(value, *rest)
        if isinstance(copy, Tensor):
            copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(background, "_copied", seen)
    saver = checkpoint.AsyncSaver()

    def refuse() -> None:
        raise ValueError("no")

    saver.save(tmp_path, 1, *make(), {}, may_appear=refuse if fails else lambda: None)
    saver._last[0].thread.join()
    gc.collect()
    assert copies
    assert not [copy for copy in copies if copy() is not None]
    with pytest.warns(UserWarning, match="step 1 is not there: no") if fails else nullcontext():
        del saver
        gc.collect()
    assert bool(checkpoint.steps(tmp_path)) is not fails


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_group_that_ends_before_the_checkpoint_is_heard_of(
    tmp_path: Path, may_write: threading.Event, is_asked: bool
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver = checkpoint.AsyncSaver()
    saver.save(tmp_path, 1, *make(), {})
    dist.destroy_process_group()
    may_write.set()
    if is_asked:
        with pytest.raises(RuntimeError, match="process group was destroyed before"):
            saver.wait()
    else:
        with pytest.warns(UserWarning, match="step 1 is not there: the process group was"):
            dropped(saver)
    assert not [*tmp_path.iterdir()]


def dropped(saver: checkpoint.AsyncSaver) -> None:
    thread = saver._last[0].thread
    background._leave_alone(saver._last)
    thread.join()


RUN = ("--steps", "4", "--save-every", "1", "--one-shot", "none", "--eval-every", "0")


@pytest.mark.slow
@pytest.mark.usefixtures("world_of_one", "brief_ends")
def test_a_run_that_saves_beside_training_leaves_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.enumerate()
    monkeypatch.setattr(
        "qsdp.train.after_training.matmul_flops_per_s", lambda device, precision: 1e9
    )
    first_saves = []
    monkeypatch.setattr(
        Job,
        "_settle",
        lambda job: first_saves.append([*checkpoint.steps(job.out / "checkpoints")]) or [],
    )
    found = []
    for name, flags in (("now", []), ("beside", ["--save-async"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(TEXT)
        main(small_run(tmp_path / name, *RUN, *flags))
        out = tmp_path / name / "out"
        found.append({n: d for n, d in tree(out / "checkpoints").items() if "distcp" in n})
        assert json.loads((out / "summary.json").read_text())["steps"] == 4
    assert found[0] == found[1]
    assert {Path(name).parent.name for name in found[0]} == {"step-00000003", "step-00000004"}
    assert first_saves == [[1], [1]]
    assert threading.enumerate() == threads


@pytest.mark.slow
@pytest.mark.usefixtures("world_of_one", "brief_ends")
def test_a_run_that_was_taken_over_lets_no_checkpoint_appear(
    tmp_path: Path, may_write: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    wait = Job.wait_saved

    def take_over_and_wait(job: Job) -> None:
        if job.saver is not None and job.saver._last:
            lock = json.loads((out / "run.lock").read_text())
            (out / "run.lock").write_text(json.dumps(lock | {"id": "theirs"}))
            may_write.set()
        wait(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "wait_saved", take_over_and_wait)
        patch.setattr("qsdp.train.lock.HEARTBEAT_S", 1e6)
        said = refused(small_run(tmp_path, *RUN, "--save-async", "--steps", "2"), capfd)
    assert "was taken over by another run" in said
    assert [*checkpoint.steps(out / "checkpoints")] == [1]
    assert not (out / "summary.json").exists()
