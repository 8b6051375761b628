"""What a release promises, read from its files; and what .ci/prove-wheel does, with stand-ins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import qsdp
from tests.support import patience

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CIBUILDWHEEL = PROJECT["tool"]["cibuildwheel"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
PROVE = ROOT / ".ci" / "prove-wheel"


def steps(job: str) -> list[dict[str, Any]]:
    return WORKFLOW["jobs"][job]["steps"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in steps(job) if "run" in step]


def recipe(target: str) -> str:
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return str(found).replace("\\\n", " ")


def test_every_wheel_is_repaired_with_the_same_excludes() -> None:
    made, released = (
        re.findall(r"--exclude '([^']+)'", text)
        for text in (recipe("wheel"), CIBUILDWHEEL["repair-wheel-command"])
    )
    assert made == released == ["libtorch*", "libc10*"]


def test_every_wheel_is_built_with_the_torch_of_make_setup_and_has_its_kernels() -> None:
    (own,) = re.findall(r"^OWN_TORCH := (.*)$", MAKEFILE, re.MULTILINE)
    assert CIBUILDWHEEL["environment"]["TORCH"].split()[0] == own
    assert CIBUILDWHEEL["environment"]["QSDP_REQUIRE_NATIVE"] == "1"
    assert "QSDP_REQUIRE_NATIVE=1 $(BIN)/python -m build" in recipe("wheel")


def test_a_wheel_and_an_sdist_are_proven_before_they_are_released() -> None:
    proofs = re.findall(r"\.ci/prove-wheel dist/qsdp-\*(\.\S+) (.*)", recipe("wheel"))
    assert proofs == [(".whl", "oldest newest"), (".tar.gz", "newest")]
    matrix = WORKFLOW["jobs"]["proof"]["strategy"]["matrix"]
    assert matrix["torch"] == ["oldest", "newest"]
    assert f">={matrix['python'][0]}" == PROJECT["project"]["requires-python"]
    assert matrix["runner"] == WORKFLOW["jobs"]["wheel"]["strategy"]["matrix"]["runner"]
    assert commands("proof") == [
        f".ci/prove-wheel dist/qsdp-*{kind} ${{{{ matrix.torch }}}}" for kind in (".whl", ".tar.gz")
    ]
    needs = {name: job.get("needs") for name, job in WORKFLOW["jobs"].items()}
    assert needs == {"sdist": None, "wheel": "sdist", "proof": "wheel", "upload": "proof"}


def test_what_a_release_runs_exists_and_has_a_version() -> None:
    for job in WORKFLOW["jobs"]:
        for command in commands(job):
            for path in re.findall(r"\.ci/\S+", command):
                assert os.access(ROOT / path, os.X_OK), path
            for package in re.findall(r"pip install (\S+)", command):
                assert re.search(r"==\d+\.\d+\.\d+$", package), package
        for step in steps(job):
            assert "run" in step or re.search(r"@v\d+\.\d+\.\d+$", step["uses"]), step
    for path in PROJECT["tool"]["scikit-build"]["sdist"]["include"]:
        assert (ROOT / path.lstrip("/")).exists(), path


def test_the_upload_alone_may_speak_for_the_project() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    jobs = WORKFLOW["jobs"].items()
    assert {name: job["permissions"] for name, job in jobs if "permissions" in job} == {
        "upload": {"id-token": "write"}
    }


def test_the_package_has_the_version_of_the_project() -> None:
    assert qsdp.__version__ == PROJECT["project"]["version"]


def test_a_tag_that_is_not_the_version_is_refused() -> None:
    (command,) = [step["run"] for step in steps("sdist") if "tag" in step.get("name", "")]
    for tag, status in ((f"v{PROJECT['project']['version']}", 0), ("v0.0.0", 1)):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        run = subprocess.run(
            ["bash", "-e", "-c", command],
            env={"PATH": path, "GITHUB_REF_NAME": tag},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=patience.seconds(),
            check=False,
        )
        assert run.returncode == status, run.stderr
        assert len(run.stderr.splitlines()) == status


# A stand-in for Python makes environments of stand-ins, which say what they were asked: their name,
# whether kernels are required, what the current folder holds ("*": nothing), arguments. They want
# to be alone on PATH.
PYTHON = r"""#!/bin/sh
if [ "$1" = -c ]; then echo cpython-399; exit; fi
mkdir -p "$4/bin"
for name in pip python qsdp torchrun; do
    printf '#!/bin/sh\nNAME=%s\n. "{folder}/stand-in"\n' $name > "$4/bin/$name"
    chmod +x "$4/bin/$name"
done
"""
STAND_IN = r"""
[ "$NAME" = pip ] || [ "$PATH" = "${{0%/*}}" ] || exit 9
[ "$NAME" = python ] && set -- program
echo "$NAME ${{QSDP_REQUIRE_NATIVE:-0}}" * "$@" >> "{folder}/asked"
[ "$NAME $1 $2" != "pip install -v" ] || echo "{pip_says}"
case "$NAME $*" in *"{fails}"*) exit 3 ;; esac
"""
LEFT_OUT = "qsdp: the native library is left out"
NEVER = "no command"


def prove(
    folder: Path, *words: str, fails: str = NEVER, pip_says: str = LEFT_OUT
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script with stand-ins; what they were asked."""
    (folder / "python").write_text(PYTHON.format(folder=folder))
    (folder / "python").chmod(0o755)
    text = STAND_IN.format(folder=folder, fails=fails, pip_says=pip_says)
    (folder / "stand-in").write_text(text)
    (folder / "asked").touch()
    for name in ("q.whl", "q.tar.gz", "q.zip"):
        (folder / name).touch()
    run = subprocess.run(
        [PROVE, *words],
        env={
            "PATH": os.environ["PATH"],
            "PYTHON": str(folder / "python"),
            "PROOF": str(folder / "proof"),
            "TORCH_ARGS": "--index-url small",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    return run, (folder / "asked").read_text().splitlines()


def torch_specifier() -> SpecifierSet:
    (torch,) = [
        requirement
        for requirement in map(Requirement, PROJECT["project"]["dependencies"])
        if requirement.name == "torch"
    ]
    return torch.specifier


def test_the_oldest_and_the_newest_torch_are_those_that_the_project_allows(tmp_path: Path) -> None:
    run, asked = prove(tmp_path, "q.whl", "oldest", "newest")
    assert run.returncode == 0, run.stderr
    versions = [
        re.search(r"torch==(\d+)\.(\d+)(\.\*)? --index-url small$", line)
        for line in asked
        if "torch==" in line
    ]
    (oldest, newest) = [(int(found[1]), int(found[2])) for found in versions if found]
    allowed = torch_specifier()
    for (major, minor), other in ((oldest, -1), (newest, 1)):
        assert f"{major}.{minor}.0" in allowed
        assert f"{major}.{minor + other}.0" not in allowed


def test_a_wheel_works_in_an_empty_folder_with_no_kernels_but_its_own(tmp_path: Path) -> None:
    run, asked = prove(tmp_path, "q.whl", "2.13.0")
    assert run.returncode == 0, run.stderr
    assert "q.whl is proven" in run.stdout
    two_ranks = "torchrun 1 * --standalone --nproc-per-node 2 -m qsdp"
    assert asked == [
        "pip 0 * install --upgrade torch==2.13.0 --index-url small",
        "pip 0 * uninstall --yes qsdp",
        f"pip 0 * install {tmp_path}/q.whl",
        "python 1 * program",
        "pip 1 * check",
        "qsdp 1 * selfcheck",
        f"{two_ranks} selfcheck",
        f"{two_ranks} train --model nano --data stdlib --steps 20 --qsdp-bits 8 --cram --out run",
    ]


def test_an_sdist_works_without_a_compiler_and_pip_says_so(tmp_path: Path) -> None:
    run, asked = prove(tmp_path, "q.tar.gz", "2.13.0")
    assert run.returncode == 0, run.stderr
    assert LEFT_OUT in run.stdout
    assert asked[-1] == "qsdp 0 * selfcheck"
    run, _ = prove(tmp_path, "q.tar.gz", "2.13.0", pip_says="installed")
    assert run.returncode == 1


@pytest.mark.parametrize("fails", ["install --upgrade", "python", "qsdp self", "train"])
def test_a_proof_fails_where_one_command_does(tmp_path: Path, fails: str) -> None:
    run, _ = prove(tmp_path, "q.whl", "2.13.0", fails=fails)
    assert run.returncode != 0
    assert run.stderr.startswith("prove-wheel: FAILED: ")
    assert "is proven" not in run.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["q.whl"],
        ["q.zip", "newest"],
        ["absent.whl", "newest"],
        ["q.whl", "newest", "latest"],
        ["q.whl", "--pre"],
    ],
)
def test_the_proof_refuses_a_mistake_in_one_sentence(tmp_path: Path, words: list[str]) -> None:
    run, asked = prove(tmp_path, *words)
    assert run.returncode == 2
    assert re.fullmatch(r"prove-wheel: [^\n]+: [^\n]+\.\n", run.stderr)
    assert run.stdout == ""
    assert asked == []
