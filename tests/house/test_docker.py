"""What the Dockerfiles promise, read from their text: no Docker engine is needed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from qsdp.__main__ import COMMANDS
from tests.support import patience

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
STEPS = ROOT / "docker" / "steps.sh"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) with comments left out and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(word, rest.strip()) for word, _, rest in pairs]


def arguments(dockerfile: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(dockerfile) if name == word]


def last_stage(dockerfile: Path) -> list[tuple[str, str]]:
    found = instructions(dockerfile)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def test_there_is_an_image_for_cpus_and_one_for_gpus() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda"]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_every_base_is_pinned_to_a_full_version(dockerfile: Path) -> None:
    bases = [rest.split()[0] for rest in arguments(dockerfile, "FROM")]
    assert bases
    for base in bases:
        assert re.search(r":\d+\.\d+\.\d+-|@sha256:[0-9a-f]{64}$", base), base


def test_what_is_copied_exists_and_reaches_the_build(dockerfile: Path) -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copies = [rest.split() for rest in arguments(dockerfile, "COPY")]
    from_context = [words for words in copies if not words[0].startswith("--from")]
    assert from_context
    for words in from_context:
        *sources, _destination = [word for word in words if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in kept, f".dockerignore leaves out {source}"


def test_it_runs_as_someone_else_than_root(dockerfile: Path) -> None:
    users = [rest for word, rest in last_stage(dockerfile) if word == "USER"]
    assert users
    assert users[-1] not in {"root", "0"}
    made = [rest for word, rest in last_stage(dockerfile) if word == "RUN" and "useradd" in rest]
    assert any(re.search(rf"\b{users[-1]}$", rest) for rest in made)


def test_it_starts_torchrun_on_a_command_that_exists(dockerfile: Path) -> None:
    stage = dict(last_stage(dockerfile))
    assert json.loads(stage["ENTRYPOINT"]) == ["torchrun"]
    command = re.search(r" -m qsdp (\w+) ", " ".join(json.loads(stage["CMD"])))
    assert command is not None
    assert command[1] in COMMANDS


def test_the_shared_script_holds_every_step_but_the_system_packages(dockerfile: Path) -> None:
    runs = [rest for rest in arguments(dockerfile, "RUN") if not rest.startswith(("apt", "user"))]
    assert runs == ["docker/steps.sh dependencies", "docker/steps.sh project"]


@pytest.mark.parametrize("words", [[], ["deploy"]])
def test_the_shared_script_refuses_a_step_it_does_not_know(words: list[str]) -> None:
    run = subprocess.run(
        [STEPS, *words],
        env={"VENV": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("usage:")
