"""A folder of results is one run's: by its lock, and by all that changes its numbers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qsdp import checkpoint
from qsdp.train import lock
from qsdp.train.config import TrainConfig
from qsdp.train.lock import hold
from tests.commands.test_command_line import main, refused, small_run
from tests.conftest import shorten_ends
from tests.support.bad_inputs import TEXT

pytestmark = pytest.mark.usefixtures("world_of_one")

FRESH = {"job": None, "host": "elsewhere", "pid": 4711, "process": None, "id": "theirs"}


def ended_process() -> dict[str, Any]:
    """What a process of this machine, which has ended, wrote into its lock."""
    code = "import json; from qsdp.train import lock; print(json.dumps(lock._owner()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    threads = threading.active_count()
    said = rf"in use by .*process {os.getpid()} .*--take-over"
    with hold(tmp_path, takes_over=False), pytest.raises(ValueError, match=said):
        hold(tmp_path, takes_over=False).__enter__()
    with hold(tmp_path, takes_over=False):
        pass
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_lock_of_another_machine_is_free_when_it_is_of_this_job_or_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in lock._JOB_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(FRESH | {"job": f"{name}=7"}))
    for mine in ("8", "none", ""):
        monkeypatch.setenv(name, mine)
        with pytest.raises(ValueError, match=f"process 4711 on elsewhere, {name}=7"):
            hold(tmp_path, takes_over=False).__enter__()
    monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold(tmp_path, takes_over=False):
        pass
    path.write_text(json.dumps(FRESH))
    silent = time.time() - lock.MISSED * lock.HEARTBEAT_S - 1
    os.utime(path, (silent, silent))
    with hold(tmp_path, takes_over=False):
        pass


def test_the_lock_of_a_process_that_has_ended_is_free_at_once(tmp_path: Path) -> None:
    owner = ended_process()
    if owner["process"] is None:
        pytest.skip("there is no /proc here")
    (tmp_path / "run.lock").write_text(json.dumps(owner))
    with hold(tmp_path, takes_over=False):
        pass
    # Its number may have been given to another one since.
    (tmp_path / "run.lock").write_text(json.dumps(owner | {"pid": os.getpid()}))
    with hold(tmp_path, takes_over=False):
        pass


def test_a_job_does_not_take_its_folder_from_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # two runs in one allocation
    with hold(tmp_path, takes_over=False), pytest.raises(ValueError, match="in use"):
        hold(tmp_path, takes_over=False).__enter__()


def test_who_was_taken_over_hears_of_it_and_leaves_the_lock_alone(tmp_path: Path) -> None:
    with hold(tmp_path, takes_over=False) as first:
        (tmp_path / "run.lock").unlink()
        first.check()  # nobody else has it
        assert lock.holder(tmp_path) == first.owner
        second = hold(tmp_path, takes_over=True)
        with second as theirs:
            with pytest.raises(ValueError, match="taken over by another run"):
                first.check()
            first.end()
            theirs.check()


def test_a_lock_that_cannot_be_read_for_once_goes_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **options: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with hold(tmp_path, takes_over=False) as first, hold(tmp_path, takes_over=True) as theirs:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", refuse)
            first.check()
        theirs.check()
        with pytest.raises(ValueError, match="taken over"):
            first.check()


def test_who_was_taken_over_ends_also_when_the_other_one_has_ended(tmp_path: Path) -> None:
    with hold(tmp_path, takes_over=False) as first:
        with hold(tmp_path, takes_over=True):
            pass
        for _ in range(2):  # also many starts later
            with hold(tmp_path, takes_over=False):
                pass
            with pytest.raises(ValueError, match="taken over by another run"):
                first.check()


@pytest.mark.parametrize(("start", "is_free"), [("1", True), ("0", False)])
def test_of_one_allocation_an_earlier_start_alone_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, is_free: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", start)
    (tmp_path / "run.lock").write_text(json.dumps(FRESH | {"job": "SLURM_JOB_ID=7", "start": "0"}))
    expected = nullcontext() if is_free else pytest.raises(ValueError, match="in use")
    with expected, hold(tmp_path, takes_over=False):
        pass


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    with hold(tmp_path, takes_over=False):
        os.utime(tmp_path / "run.lock", (1, 1))
        deadline = time.monotonic() + 60
        while (tmp_path / "run.lock").stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 1}'])
def test_a_damaged_lock_keeps_nobody_out_for_long(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)  # it may be that of a run which is about to write it
    with pytest.raises(ValueError, match="in use by a"):
        hold(tmp_path, takes_over=False).__enter__()
    os.utime(path, (1, 1))
    with hold(tmp_path, takes_over=False):
        pass


# Another value of every setting; what changes no number is in the second.
CHANGES: dict[str, Any] = {
    "model": "tiny",
    "steps": 2001,
    "batch_size": 7,
    "grad_accum": 2,
    "seq_len": 65,
    "lr": 2e-3,
    "min_lr": 1e-5,
    "warmup_steps": 99,
    "weight_decay": 0.2,
    "beta2": 0.9,
    "clip_grad": 2.0,
    "seed": 1,
    "precision": "bf16",
    "replicas": 2,
    "eval_batches": 9,
    "backend": "gloo",
    "one_shot": ("0.9",),
    "prunable": "*.up.*",
    "sam": True,
    "gmp": True,
    "acdc": True,
    "qsdp_bits": 4,
    "qsdp_weight_bits": 4,
    "qsdp_grad_bits": 5,
    "qsdp_budget": 4.0,
}
NO_CHANGES: dict[str, Any] = {
    "out": "elsewhere",
    "resume": "none",
    "keep": 3,
    "max_bad_steps": 3,
    "save_every": 7,
    "save_async": True,
    "eval_every": 9,
    "tensorboard": True,
    "timeout_s": 9,
    "take_over": True,
    "data": "else",
    "tokenizer": "byte",
}
OF_A_METHOD: dict[str, tuple[str, Any]] = {
    "cram_sparsity": ("cram", (0.5,)),
    "cram_targets": ("cram", ("2:4",)),
    "cram_rho": ("cram", 0.1),
    "cram_normalize": ("cram", True),
    "cram_plus": ("cram", False),
    "cram_sparse_grad": ("cram", False),
    "cram": ("qsdp_bits", 4),
    "acdc_sparsity": ("acdc", 0.5),
    "acdc_target": ("acdc", "2:4"),
    "acdc_warmup": ("acdc", 9),
    "acdc_phase": ("acdc", 50),
    "acdc_last_dense": ("acdc", 99),
    "acdc_last_sparse": ("acdc", 99),
    "eval_every": ("acdc", 7),
    "gmp_sparsity": ("gmp", 0.8),
    "gmp_initial": ("gmp", 0.1),
    "gmp_start": ("gmp", 9),
    "gmp_every": ("gmp", 9),
    "gmp_end": ("gmp", 900),
    "sam_rho": ("sam", 0.1),
}
OF_THE_WIRE: dict[str, Any] = {
    "qsdp_embedding_bits": 7,
    "qsdp_local_grad_bits": 7,
    "qsdp_bucket_size": 64,
    "qsdp_rounding": "nearest",
    "qsdp_levels": "learned",
    "qsdp_policy": "*=5",
    "qsdp_warmup_steps": 9,
    "qsdp_gather": "once",
    "qsdp_reduce": "flat",
    "qsdp_ranks_per_node": 2,
}


def test_every_setting_is_part_of_a_run_or_changes_no_number() -> None:
    told = {*CHANGES, *NO_CHANGES, *OF_A_METHOD, *OF_THE_WIRE}
    # Both need two others, which are told.
    told |= {"qsdp_level_steps", "qsdp_warmup_bits", "qsdp_errors"}
    assert told == {field.name for field in fields(TrainConfig)}
    plain, coded = TrainConfig(), TrainConfig(qsdp_bits=4)
    pairs = [(plain, {name: value}) for name, value in CHANGES.items()]
    pairs += [(coded, {name: value}) for name, value in OF_THE_WIRE.items()]
    for name, (method, value) in OF_A_METHOD.items():
        chosen = {method: value if method == "qsdp_bits" else True}
        pairs.append((TrainConfig(**chosen), {name: True if name == "cram" else value}))
    for config, change in pairs:
        other = replace(config, **change)
        assert other.identity != config.identity, change
        assert other.out_dir != config.out_dir, change
    for name, value in NO_CHANGES.items():
        assert replace(plain, **{name: value}).identity == plain.identity, name
    assert replace(coded, qsdp_errors=True).identity == coded.identity
    for name in ("data", "tokenizer"):
        assert replace(plain, **{name: "else"}).out_dir != plain.out_dir


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"qsdp_bits": 8}, {"qsdp_weight_bits": 8, "qsdp_grad_bits": 8}),
        ({"qsdp_bits": 8}, {"qsdp_bits": 8, "qsdp_gather": "twice", "qsdp_reduce": "auto"}),
        ({"cram": True, "cram_sparsity": (0.5,)}, {"cram": True, "cram_targets": ("0.5",)}),
        ({"acdc": True}, {"acdc": True, "acdc_target": "0.9"}),
        ({"acdc": True}, {"acdc": True, "acdc_warmup": 200}),
        ({"lr": 1e-3}, {"lr": 1e-3, "min_lr": 1e-4}),
    ],
)
def test_the_same_run_may_be_spelled_in_several_ways(one: Any, other: Any) -> None:
    assert TrainConfig(**one).identity == TrainConfig(**other).identity


def test_what_auto_comes_to_is_the_same_run_as_if_given_by_hand() -> None:
    auto = TrainConfig(qsdp_bits="auto")
    chosen = auto.resolved({"qsdp_bits": 4, "qsdp_gather": "once"})
    by_hand = TrainConfig(qsdp_bits=4, qsdp_gather="once")
    assert chosen.identity == by_hand.identity
    assert (chosen.out_dir, chosen.wire) == (auto.out_dir, by_hand.wire)
    assert auto.resolved({"qsdp_bits": None}).identity == TrainConfig().identity
    folders = {str(c.out_dir) for c in (auto, by_hand, TrainConfig(), TrainConfig(qsdp_bits=8))}
    assert len(folders) == 4


@pytest.fixture(autouse=True, scope="module")
def _brief_ends() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten_ends(patch)
        yield


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of two steps, trained once for each set of flags."""
    done: dict[tuple[str, ...], Path] = {}

    def train(*flags: str) -> Path:
        if flags not in done:
            done[flags] = tmp_path_factory.mktemp("finished")
            (done[flags] / "text.txt").write_text(TEXT)
            # The folder itself, empty still: so has it a job that may change its ranks.
            main(small_run(done[flags], *flags, "--resume", str(done[flags] / "out")))
        return done[flags]

    return train


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "9e-3", "--batch-size", "3"], "batch_size 2, not 3; lr 0.001, not 0.009"),
        (["--steps", "4"], "steps 2, not 4"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--one-shot", "0.5"], "one_shot"),
        (["--cram"], "optimizer AdamW, not CrAM"),
        (["--qsdp-bits", "8"], "qsdp_weight_bits unset, not 8"),
        (["--data", "{}/other.txt"], "another data"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_another_run_in_the_same_folder_is_refused_by_what_differs(
    finished_once: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    folder = finished_once()
    other = TEXT.replace("quick", "kciuq")
    assert (len(other), {*other}) == (len(TEXT), {*TEXT})
    (folder / "other.txt").write_text(other)
    before = contents(folder / "out")
    told = refused(small_run(folder, *(flag.format(folder) for flag in flags)), capfd)
    assert said in told
    assert f"--resume {folder / 'out'}" in told
    assert contents(folder / "out") == before


class Cut(BaseException):
    """What ends a run without a word."""


def interrupted(monkeypatch: pytest.MonkeyPatch, flags: list[str], at_step: int) -> None:
    """Run until the step before is done, then end."""
    from qsdp.train import loop

    take = loop.train_step

    def step(job: Any, **options: Any) -> Any:
        if job.steps_done + 1 == at_step:
            raise Cut
        return take(job, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        cut(flags)


def cut(flags: list[str]) -> None:
    with pytest.raises(Cut):
        main(flags)
    dist.destroy_process_group()  # which would have ended with the process


def rates(out: Path) -> dict[int, float]:
    """The learning rates of the steps that metrics tell of, each once and without a gap."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    return {line["step"]: line["lr"] for line in lines}


LONGER = ("--steps", "4", "--save-every", "1", "--keep", "9", "--one-shot", "none")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "step-00000002"])
def test_what_an_earlier_run_left_stays_until_the_new_one_has_a_checkpoint(
    finished_once: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    folder = tmp_path / "run"
    out = folder / "out"
    before, old = contents(out), rates(out)
    resume = how if how == "none" else str(out / "checkpoints" / how)
    first = 1 if how == "none" else 3
    flags = small_run(folder, *LONGER, "--lr", "5e-3", "--resume", resume)

    interrupted(monkeypatch, flags, first)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    beside = {name.partition(".")[0] for name in after.keys() - before.keys()}
    assert beside == {"metrics", "config"}
    # The old run is still the one that is found.
    assert "finished after 4 steps" in (main(small_run(folder, *LONGER)), capfd.readouterr().out)[1]

    interrupted(monkeypatch, flags, first + 1)
    new = rates(out)
    assert [*new] == [*range(1, first + 1)]
    assert all((new[step] == old[step]) is (step < first) for step in new)
    assert not (out / "summary.json").exists()
    assert "lr = 0.005" in (out / "config.toml").read_text()
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {f"step-{step:08d}" for step in range(1, first + 1)}
    said = capfd.readouterr().out
    assert "stay until this run has one" in said
    assert "as outdated now: summary.json, checkpoints/step-0000000" in said

    # The same command goes on from what came of it, where a checkpoint is named.
    main(flags)
    whole = rates(out)
    if how != "none":
        assert f"Going on from {out}/checkpoints/step-0000000{first}" in capfd.readouterr().out
        assert whole[first] == new[first]
    assert json.loads((out / "summary.json").read_text())["steps"] == 4
    assert [path.name for path in out.glob("metrics*")] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_begins_a_run_but_takes_none_away(
    finished_once: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = finished_once(*LONGER) / "out" / "checkpoints" / "step-00000002"
    shutil.copytree(finished_once(), tmp_path / "taken")
    before = contents(tmp_path / "taken" / "out")
    named = ["--resume", str(source)]
    said = refused(small_run(tmp_path / "taken", *LONGER, *named), capfd)
    assert "holds another run, with step-00000002" in said
    assert contents(tmp_path / "taken" / "out") == before

    (tmp_path / "free" / "out").mkdir(parents=True)
    (tmp_path / "free" / "text.txt").write_text(TEXT)
    out = tmp_path / "free" / "out"
    # Lines of an attempt that saved nothing are no part of this run.
    (out / "metrics.jsonl").write_text((source.parents[1] / "metrics.jsonl").read_text())
    flags = small_run(tmp_path / "free", *LONGER, *named)
    interrupted(monkeypatch, flags, 4)
    assert "removed, of attempts that ended before: metrics.jsonl" in capfd.readouterr().out
    main(flags)
    assert f"Going on from {out}/checkpoints/step-00000003" in capfd.readouterr().out
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [3, 4]
    told = refused(small_run(tmp_path / "free", *LONGER, *named, "--lr", "1"), capfd)
    assert "holds another run, with step-00000004" in told


@pytest.mark.slow
def test_a_crash_between_the_first_checkpoint_and_its_metrics_loses_no_line(
    finished_once: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    out = tmp_path / "run" / "out"
    old = rates(out)
    flags = small_run(tmp_path / "run", *LONGER, "--lr", "5e-3")
    with monkeypatch.context() as patch:
        patch.setattr("qsdp.train.setup.Job._settle", lambda job: (_ for _ in ()).throw(Cut))
        cut([*flags, "--resume", "none"])
    first = checkpoint.read_meta(out / "checkpoints" / "step-00000001")
    assert first["config"]["lr"] == 5e-3
    assert (step_of(out), rates(out)) == (4, old)
    interrupted(monkeypatch, flags, 2)
    assert [*rates(out)] == [1]
    main(flags)
    assert rates(out).keys() == old.keys()
    assert rates(out)[4] != old[4]
    assert {path.name for path in out.iterdir()} == {
        *("checkpoints", "config.toml", "metrics.jsonl", "summary.json")
    }


def step_of(out: Path) -> int:
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    return int(checkpoint.read_meta(newest)["step"])


@pytest.mark.slow
def test_a_command_that_names_the_newest_checkpoint_may_be_started_again_and_again(
    finished_once: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    out = tmp_path / "run" / "out"
    named = out / "checkpoints" / "step-00000004"
    flags = small_run(tmp_path / "run", *LONGER, "--resume", str(named), "--steps", "8")
    interrupted(monkeypatch, flags, 7)
    assert step_of(out) == 6
    shutil.rmtree(named)  # as --keep may have it
    interrupted(monkeypatch, flags, 8)
    assert step_of(out) == 7
    main(flags)
    assert [*rates(out)] == [*range(1, 9)]


@pytest.mark.slow
def test_a_run_without_a_step_left_leaves_nothing_of_two(
    finished_once: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    out = tmp_path / "run" / "out"
    back = str(out / "checkpoints" / "step-00000002")
    main(small_run(tmp_path / "run", *LONGER, "--resume", back, "--steps", "2"))
    assert (step_of(out), [*rates(out)]) == (2, [1, 2])
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    main(small_run(tmp_path / "run", *LONGER, "--steps", "2", "--resume", str(out), "--seed", "0"))
    main(["--config", str(out / "config.toml")])
    assert "holds this run, finished after 2 steps" in capfd.readouterr().out
    assert [path.name for path in out.glob("metrics*")] == ["metrics.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("is_restarted", [True, False])
def test_torchrun_does_not_begin_anew_what_it_restarts(
    finished_once: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_restarted: bool,
) -> None:
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    out = tmp_path / "run" / "out"
    # torchrun tells its processes of it, and one alone is a world without its store.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    flags = small_run(tmp_path / "run", *LONGER, "--resume", "none", "--lr", "5e-3")
    interrupted(monkeypatch, flags, 3)
    assert step_of(out) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(int(is_restarted)))
    interrupted(monkeypatch, flags, 4 if is_restarted else 2)
    assert step_of(out) == (3 if is_restarted else 1)


@pytest.mark.slow
def test_events_are_of_the_run_whose_checkpoints_are_there(
    finished_once: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    out = tmp_path / "run" / "out"
    flags = small_run(tmp_path / "run", *LONGER, "--resume", "none", "--lr", "5e-3")
    flags += ["--tensorboard", "--save-every", "2"]
    interrupted(monkeypatch, flags, 2)
    assert not (out / "tensorboard").exists()
    main(flags)
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("lr")}
    assert shown == pytest.approx(rates(out))


@pytest.mark.slow
@pytest.mark.parametrize("meta", ["{", '{"step": 4, "checksums": {}}'])
def test_a_newest_checkpoint_that_cannot_be_read_is_in_nobodys_way(
    finished_once: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    meta: str,
) -> None:
    shutil.copytree(finished_once(*LONGER), tmp_path / "run")
    folder = tmp_path / "run" / "out" / "checkpoints"
    (folder / "step-00000004" / "meta.json").write_text(meta)
    flags = small_run(tmp_path / "run", *LONGER)
    interrupted(monkeypatch, [*flags, "--resume", str(folder / "step-00000003")], 4)
    interrupted(monkeypatch, [*flags, "--resume", "none"], 2)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
