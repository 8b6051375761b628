"""A folder of results is one run's: another is refused, or takes over with a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsdp import checkpoint
from qsdp.commands.train import main
from tests.support.bad_inputs import TEXT
from tests.support.command_line import refused, small_run
from tests.support.ends import Cut, contents, cut, interrupted, shorten_ends

pytestmark = pytest.mark.usefixtures("world_of_one")


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
        patch.setattr("qsdp.train.job.Job._settle", lambda job: (_ for _ in ()).throw(Cut))
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
