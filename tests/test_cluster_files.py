"""The files for Slurm and Kubernetes start one launcher a node, which meet by c10d."""

import os
import stat
import subprocess
from pathlib import Path

import yaml

from tests import patience

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
K8S = ROOT / "launch" / "k8s" / "train.yaml"


def stub(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_sbatch(tmp_path: Path, *flags: str) -> list[list[str]]:
    """What each node's launcher is started with, by stand-ins for the commands of Slurm."""
    stub(tmp_path, "scontrol", 'printf "%s\\n" node-7 node-9')
    srun = 'while [[ $1 == --* ]]; do shift; done\nfor _ in 1 2; do "$@"; done'
    stub(tmp_path, "srun", srun)
    stub(tmp_path, "torchrun", f'(IFS=$\'\\t\'; echo "$*") >> "{tmp_path}/started"')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[7,9]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "31",
    }
    subprocess.run(
        ["bash", SBATCH, *flags], env=environment, cwd=ROOT, check=True, timeout=patience.seconds()
    )
    return [line.split("\t") for line in (tmp_path / "started").read_text().splitlines()]


def test_slurm_starts_one_launcher_a_node_and_they_meet_on_the_first(tmp_path: Path) -> None:
    started = run_sbatch(tmp_path, "--out", "a folder")
    assert len(started) == 2
    assert started[0] == started[1]
    options = dict(zip(started[0][0:10:2], started[0][1:10:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "gpu",
        "--rdzv-id": "31",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node-7:29500",
    }
    script, *flags = started[0][10:]
    assert (ROOT / script).is_file()
    assert flags[-2:] == ["--out", "a folder"]


def test_slurm_asks_for_two_nodes_and_one_task_on_each() -> None:
    lines = SBATCH.read_text().splitlines()
    assert "#SBATCH --nodes=2" in lines
    assert "#SBATCH --ntasks-per-node=1" in lines


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


def test_kubernetes_starts_a_script_that_exists_and_not_as_root() -> None:
    _service, job = yaml.safe_load_all(K8S.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (script,) = [arg for arg in container["args"] if arg.endswith(".py")]
    assert (ROOT / script).is_file()
    assert pod["securityContext"]["runAsNonRoot"] is True
    lines = (ROOT / "docker" / "Dockerfile.cuda").read_text().splitlines()
    assert any(f"--uid {pod['securityContext']['runAsUser']} " in line for line in lines)
