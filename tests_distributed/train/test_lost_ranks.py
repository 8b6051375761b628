"""A rank that ends or hangs ends all ranks soon, with a sentence that says what it was."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import qsdp
from tests.support import patience
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.launching import SMALL, TEXT, Job, start
from tests_distributed.support.pool import preloaded

HANG_S = patience.seconds(8)
"""How long a collective waits for a rank that hangs: no working one takes as long."""


def _loop(rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    """What a user of the library writes."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    model = shard(make_model())
    qsdp.install(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1_000_000):
        torch.autograd.backward(model(*make_batch(model, step)))
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with (folder / "steps").open("a") as steps:
                steps.write(f"{step}\n")


def _job(rank: int, ranks: int, folder: Path, timeout_s: float, *more: str) -> None:
    """The training job, where the launcher's store is a file."""
    from qsdp.commands import train
    from qsdp.train import world

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(folder / "store"), ranks)
    world.rendezvous = lambda url, timeout: iter([(store, rank, ranks)])
    flags = ["--data", str(folder / "text.txt"), "--out", str(folder / "out"), *SMALL]
    train.main([*flags, *more, "--timeout-s", str(int(timeout_s)), "--steps", "1000000"])


def _quantized_job(rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    _job(rank, ranks, folder, timeout_s, "--qsdp-bits", "8")


def _measuring_job(rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    """Rank 1 finds no memory in the middle of measuring the link."""
    from qsdp.train.auto.link_speed import Links

    make, calls = Links._bytes, itertools.count()

    def made(links: Links, size: int) -> Tensor:
        is_full = rank == 1 and next(calls) == 9
        return make(links, 1 << 60 if is_full else size)

    Links._bytes = made  # type: ignore[method-assign]
    _job(rank, ranks, folder, timeout_s, "--qsdp-bits", "auto")


Life = Callable[[int, int, Path, float], None]


def _live(life: Life, rank: int, ranks: int, folder: Path, timeout_s: float) -> None:
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    life(rank, ranks, folder, timeout_s)


def _start(life: Life, ranks: int, folder: Path, timeout_s: float) -> list[Any]:
    """Processes, of which each writes into a file of its own."""
    (folder / "text.txt").write_text(TEXT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    processes: list[Any] = []
    for rank in range(ranks):
        process = context.Process(
            target=_live, args=(life, rank, ranks, folder, timeout_s), daemon=True
        )
        process.start()
        processes.append(process)
    return processes


def _wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + patience.seconds()
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Callable[..., tuple[list[Any], list[str], float]]]:
    """Let three processes live a life, and send one a signal in the middle of a step.

    Returns exit codes, outputs and how many seconds the others took to end.
    """
    processes: list[Any] = []

    def run(
        life: Life, progress: str, victim: int, number: int, timeout_s: float
    ) -> tuple[list[Any], list[str], float]:
        processes.extend(_start(life, 3, tmp_path, timeout_s))
        outputs = [tmp_path / f"output-{rank}" for rank in range(3)]

        def has_begun() -> bool:
            text = "\n".join(path.read_text() for path in outputs if path.exists())
            assert all(process.is_alive() for process in processes), text
            return _num_lines(tmp_path / progress) > 3

        _wait_until(has_begun, "no step was taken")
        time.sleep(random.uniform(0, 0.05))
        os.kill(processes[victim].pid, number)
        started = time.monotonic()
        others = [process for i, process in enumerate(processes) if i != victim]
        for process in others:
            process.join(patience.seconds())
        seconds = time.monotonic() - started
        codes = [process.exitcode for process in others]
        return codes, [path.read_text() for i, path in enumerate(outputs) if i != victim], seconds

    yield run
    for process in processes:
        process.kill()
        process.join()


SENTENCE = (
    r"the (agreement at a (forward|backward) pass|(gather|reduce) of the group of \S+"
    r"( and \d+ others?)? at step \d+) failed on rank {rank}: a rank has ended or does not answer "
    r"\(.+\)"
)
IN_THE_JOB = (
    rf"^error on rank {{rank}}: ({SENTENCE}|the (sum over all ranks|sum of the gradients' norm|"
    r"agreement at qsdp.clip_grad_norm_) failed on rank {rank}: a rank has ended or does not "
    r"answer \(.+\)|a collective failed: a rank .+)\.$"
)


@pytest.mark.parametrize(
    ("life", "progress", "said", "number"),
    [
        (_loop, "steps", SENTENCE, signal.SIGKILL),
        pytest.param(_loop, "steps", SENTENCE, signal.SIGSTOP, marks=pytest.mark.heavy),
        (_quantized_job, "out/metrics.jsonl", IN_THE_JOB, signal.SIGKILL),
        (_quantized_job, "out/metrics.jsonl", IN_THE_JOB, signal.SIGSTOP),
        (_job, "out/metrics.jsonl", IN_THE_JOB, signal.SIGKILL),
    ],
)
def test_when_a_rank_ends_or_hangs_the_others_end_and_name_the_collective(
    three: Callable[..., tuple[list[Any], list[str], float]],
    life: Life,
    progress: str,
    said: str,
    number: int,
) -> None:
    victim = random.randrange(3)
    # Of a rank that has ended the others hear before they have waited that long.
    timeout_s = 2 * patience.seconds() if number == signal.SIGKILL else HANG_S
    codes, outputs, seconds = three(life, progress, victim, number, timeout_s)
    assert seconds < patience.seconds()
    survivors = [rank for rank in range(3) if rank != victim]
    for rank, code, output in zip(survivors, codes, outputs, strict=True):
        assert code not in (None, 0), output
        assert re.search(said.format(rank=rank), output, re.MULTILINE), output
        if life is not _loop:
            assert code == 1
            assert "Traceback" not in output


def test_a_fault_of_a_rank_that_measures_the_link_ends_all_in_a_sentence_each(
    tmp_path: Path,
) -> None:
    processes = _start(_measuring_job, 2, tmp_path, 2 * patience.seconds())
    try:
        for process in processes:
            process.join(patience.seconds())
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    outputs = [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]
    assert codes == [1, 1], outputs
    for rank, why in enumerate([r"a rank has ended or does not answer \(", ".*allocate memory"]):
        said = f"^error on rank {rank}: the measuring of the link failed on rank {rank}: {why}"
        assert re.search(said, outputs[rank], re.MULTILINE), outputs[rank]
        assert "Traceback" not in outputs[rank]


def test_under_torchrun_a_killed_rank_is_replaced_and_a_job_that_is_told_to_end_saves(
    tmp_path: Path,
) -> None:
    # One launch for all: starting ranks takes longest.
    program = tmp_path / "told.py"
    program.write_text(
        "import os, pathlib\n"
        "from qsdp.commands import exit, train\n"
        "end = exit.end_process\n"
        "def end_and_say(status):\n"
        "    name = f'status-{os.environ[\"RANK\"]}'\n"
        "    (pathlib.Path(__file__).parent / name).write_text(str(status))\n"
        "    end(status)\n"
        "exit.end_process = end_and_say\n"
        "exit.run(train.main)\n"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(out), *SMALL, "--eval-every", "0"]
    flags += ["--qsdp-bits", "8", "--steps", "1000000", "--save-every", "3"]
    launcher = ("--standalone", "--max-restarts", "1")
    job = start(*flags, program=str(program), launcher=launcher, num_ranks=2)
    checkpoints = out / "checkpoints"
    try:
        pids = _have_saved(job, checkpoints, {})
        os.kill(pids[1], signal.SIGKILL)
        _have_saved(job, checkpoints, pids)
        job.tell(signal.SIGTERM)
        assert job.wait() == 1
    finally:
        job.kill()
    lost = r"^error on rank 0: .* a rank has ended or does not answer \(.+\)\.$"  # a save has many
    assert re.search(lost, job.output, re.MULTILINE), job.output
    assert 'told.py", line' not in job.output
    assert [(tmp_path / f"status-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, len(lines) + 1)]
    assert f"SIGTERM: step {len(lines)} of 1000000 is saved" in job.output
    assert (checkpoints / f"step-{len(lines):08d}").is_dir()


def _have_saved(job: Job, checkpoints: Path, earlier: dict[int, int]) -> dict[int, int]:
    """Wait until other processes than the earlier ones have saved, and return that of each rank."""

    def are_others() -> bool:
        return len(job.ranks()) == 2 and not {*job.ranks().values()} & {*earlier.values()}

    def steps() -> set[str]:
        return {path.name for path in checkpoints.glob("step-????????")}

    _wait_until(are_others, "torchrun has started nobody")
    found = steps()
    _wait_until(lambda: bool(steps() - found), "none was saved")
    return job.ranks()
