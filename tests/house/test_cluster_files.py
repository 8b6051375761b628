"""The files for Slurm and Kubernetes start one launcher a node.

The launchers meet by c10d, and hand on what the scheduler tells them.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from qsdp.__main__ import COMMANDS
from tests.support import patience

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
K8S = ROOT / "launch" / "k8s" / "train.yaml"
POD = ROOT / "launch" / "k8s" / "run.sh"

# A command that takes no end until it is told to, and ``enough`` is there. Its words: ``told``.
WAITING = """
hear() { echo "$1" >> told; touch heard; }
trap 'hear USR1' USR1
trap 'hear TERM' TERM
echo $$ > running.new; mv running.new running
while [[ ! -e heard || ! -e enough ]]; do sleep 0.01; done
"""


def stub(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment(folder: Path) -> dict[str, str]:
    """For the batch script, with the stubs of ``folder``."""
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[7,9]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "31",
    }


def run_sbatch(tmp_path: Path, *flags: str) -> list[list[str]]:
    """What each node's launcher is started with, by stand-ins for the commands of Slurm."""
    stub(tmp_path, "scontrol", 'printf "%s\\n" node-7 node-9')
    srun = 'while [[ $1 == --* ]]; do shift; done\nfor _ in 1 2; do "$@"; done'
    stub(tmp_path, "srun", srun)
    stub(tmp_path, "torchrun", f'(IFS=$\'\\t\'; echo "$*") >> "{tmp_path}/started"')
    subprocess.run(
        ["bash", SBATCH, *flags],
        env=environment(tmp_path),
        cwd=ROOT,
        check=True,
        timeout=patience.seconds(),
    )
    return [line.split("\t") for line in (tmp_path / "started").read_text().splitlines()]


def test_slurm_starts_one_launcher_a_node_and_they_meet_on_the_first(tmp_path: Path) -> None:
    started = run_sbatch(tmp_path, "--out", "a folder")
    assert len(started) == 2
    assert started[0] == started[1]
    options = dict(zip(started[0][0:12:2], started[0][1:12:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "gpu",
        "--rdzv-id": "31",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node-7:29500",
        "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    }
    *module, command = started[0][12:15]
    assert module == ["-m", "qsdp"]
    assert command in COMMANDS
    flags = started[0][15:]
    assert flags[-2:] == ["--out", "a folder"]


def test_slurm_asks_for_two_nodes_and_one_task_on_each() -> None:
    lines = SBATCH.read_text().splitlines()
    assert "#SBATCH --nodes=2" in lines
    assert "#SBATCH --ntasks-per-node=1" in lines


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + patience.seconds()
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
    return path.read_text()


def tell_again(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Several times, each of which the process has heard before the next, and the last at the end.

    bash forgets the status of a command whose end comes with a signal.
    """
    deadline = time.monotonic() + patience.seconds()
    for _ in range(3):
        process.send_signal(number)
        while not waits(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def waits(pid: int) -> bool:
    """Whether the process sleeps, with no signal left to hear."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    said = dict(line.split(":\t", 1) for line in lines)
    return said["State"].startswith("S") and int(said["ShdPnd"], 16) == 0


# What takes its time before the launcher is started: until ``go`` is there.
HELD = "touch looking; while [[ ! -e go ]]; do sleep 0.01; done"


def told_before_the_launcher_is_started(
    folder: Path, command: list[str | Path], number: signal.Signals
) -> int:
    """The exit status of a ``command`` whose stub is HELD meanwhile."""
    shell = subprocess.Popen(["bash", *command], env=environment(folder), cwd=folder)
    try:
        wait_for(folder / "looking")
        shell.send_signal(number)
        (folder / "go").touch()
        return shell.wait(patience.seconds())
    finally:
        (folder / "go").touch()
        shell.kill()


@pytest.mark.parametrize(
    ("told", "status", "requeued"), [(signal.SIGUSR1, 0, "requeue 31\n"), (signal.SIGTERM, 143, "")]
)
def test_slurm_starts_nothing_when_it_was_told_before(
    tmp_path: Path, told: signal.Signals, status: int, requeued: str
) -> None:
    (tmp_path / "told").touch()
    show = f"[[ $1 == show ]] && {{ {HELD}; echo node-7; }}"
    stub(tmp_path, "scontrol", f'{show} || echo "$*" >> told')
    stub(tmp_path, "srun", "echo started >> told")
    assert told_before_the_launcher_is_started(tmp_path, [SBATCH], told) == status
    assert (tmp_path / "told").read_text() == requeued


@pytest.mark.parametrize("told", [None, signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("status", [0, 1])
def test_slurm_waits_for_what_a_run_saves_and_queues_it_again_when_time_is_up(
    tmp_path: Path, told: signal.Signals | None, status: int
) -> None:
    stub(tmp_path, "scontrol", '[[ $1 == show ]] && echo node-7 || echo "$*" >> told')
    waiting = "touch heard enough" if told is None else ""
    stub(tmp_path, "srun", f"{waiting}\n{WAITING}\necho ended >> told\nexit {status}")
    shell = subprocess.Popen(["bash", SBATCH], env=environment(tmp_path), cwd=tmp_path)
    try:
        srun = int(wait_for(tmp_path / "running"))
        if told is not None:
            shell.send_signal(told)
        if told == signal.SIGTERM:  # Slurm tells all processes of the job
            os.kill(srun, told)
        if told is not None:  # torchrun is to hear it once
            wait_for(tmp_path / "heard")
            tell_again(shell, signal.SIGUSR1)
            (tmp_path / "enough").touch()
        assert shell.wait(patience.seconds()) == status
    finally:
        shell.kill()
    lines = (tmp_path / "told").read_text().splitlines()
    assert (
        lines
        == {
            None: ["ended"],
            signal.SIGUSR1: ["USR1", "ended", "requeue 31"],
            signal.SIGTERM: ["TERM", "ended", "requeue 31"],
        }[told]
    )


def test_schedulers_let_ranks_take_less_time_than_they_have() -> None:
    lines = SBATCH.read_text().splitlines()
    (signalled,) = [line for line in lines if line.startswith("#SBATCH --signal=B:USR1@")]
    (ranks,) = [line for line in lines if line.startswith("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT")]
    assert int(ranks.rpartition(":-")[2].rstrip("}")) < int(signalled.rpartition("@")[2])
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
    _service, job = yaml.safe_load_all(K8S.read_text())
    pod = job["spec"]["template"]["spec"]
    (timeout,) = pod["containers"][0]["env"]
    assert timeout["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert int(timeout["value"]) < pod["terminationGracePeriodSeconds"]


# What torchrun does, whether a summary of an earlier run is there, and what the pod ends with.
PODS: dict[str, tuple[str, bool, int]] = {
    "told": ("exit 1", False, 75),
    "told, as another run was finished": ("exit 1", True, 75),
    "told when all was done": ("touch -d 2001-01-01 out/summary.json; exit 1", True, 0),
    "another pod was told": ("exit 0", False, 75),
    "another pod was told, as another run was finished": ("exit 0", True, 75),
    "finished": ("touch out/summary.json; exit 0", False, 0),
    "finished, as another run was": ("touch out/summary.json; exit 0", True, 0),
    "failed": ("touch out/summary.json; exit 3", False, 3),
}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_completed_when_the_run_has(tmp_path: Path, name: str) -> None:
    end, has_summary, expected = PODS[name]
    is_told = name.startswith("told")
    waiting = "" if is_told else "touch heard enough"
    stub(tmp_path, "torchrun", f"{waiting}\n{WAITING}\necho ended >> told\n{end}")
    (tmp_path / "out").mkdir()
    if has_summary:
        (tmp_path / "out" / "summary.json").touch()
    is_news = "summary.json" in end
    pod = subprocess.Popen(
        ["bash", POD, "--nnodes=2", "-m", "qsdp", "train", "--out=out"],
        env=environment(tmp_path) | {"PATIENCE_S": "30" if is_news or is_told else "0"},
        cwd=tmp_path,
    )
    try:
        wait_for(tmp_path / "running")
        if is_told:
            pod.terminate()
            wait_for(tmp_path / "heard")
            tell_again(pod, signal.SIGTERM)  # torchrun is to hear it once
            (tmp_path / "enough").touch()
        assert pod.wait(patience.seconds()) == expected
    finally:
        pod.kill()
    assert (tmp_path / "told").read_text().split() == ["TERM"] * is_told + ["ended"]


def test_a_pod_that_was_told_before_starts_nothing(tmp_path: Path) -> None:
    stub(tmp_path, "stat", HELD)
    stub(tmp_path, "torchrun", "touch started")
    command = [POD, "--out=out"]
    assert told_before_the_launcher_is_started(tmp_path, command, signal.SIGTERM) == 75
    assert not (tmp_path / "started").exists()


def test_kubernetes_pods_find_the_first_by_the_name_of_the_service() -> None:
    service, job = yaml.safe_load_all(K8S.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"

    (container,) = pod["containers"]
    options = dict(arg.partition("=")[::2] for arg in container["args"])
    first_pod = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert options["--rdzv-backend"] == "c10d"
    assert options["--rdzv-endpoint"] == f"{first_pod}:{container['ports'][0]['containerPort']}"
    assert int(options["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_kubernetes_starts_a_command_that_exists_and_not_as_root() -> None:
    _service, job = yaml.safe_load_all(K8S.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    at = container["args"].index("-m")
    assert container["args"][at + 1] == "qsdp"
    assert container["args"][at + 2] in COMMANDS
    assert pod["securityContext"]["runAsNonRoot"] is True
    lines = (ROOT / "docker" / "Dockerfile.cuda").read_text().splitlines()
    assert any(f"--uid {pod['securityContext']['runAsUser']} " in line for line in lines)
