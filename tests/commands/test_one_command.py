"""The command ``qsdp``: which commands it has, and what it says of others."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import qsdp
from qsdp import __main__ as program
from tests.support.command_line import assert_is_one_sentence

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``run(*arguments)``: the exit status, without ending the process."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qsdp", *arguments])
        try:
            program._run_command()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return call


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    "arguments", [[], [""], 99 * ["trian"], ["--steps", "3"], ["exit"], ["-v"], ["--help", "train"]]
)
def test_what_is_no_command_is_refused_in_one_sentence(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(*arguments) == 2
    said = capfd.readouterr().err
    assert_is_one_sentence(said)
    assert all(name in said for name in program.COMMANDS)


@pytest.mark.parametrize("rank", range(1, 3))
def test_only_rank_0_says_it(
    run: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("qsdp.commands.exit.stop_was_requested", lambda: True)
    monkeypatch.setattr("qsdp.commands.exit._SHORT_PATIENCE_S", 0.0)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run("trian") == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    assert run(flag) == 0
    listed = re.findall(r"(?m)^  (\w+) +\S", capfd.readouterr().out)
    assert listed[: len(program.COMMANDS)] == [*program.COMMANDS]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_only_rank_0_helps(
    run: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(*arguments) == 0
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_while_a_command_is_loaded_is_one_line(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "import_module", interrupt)
    assert run("train") == 130
    assert re.fullmatch(r"interrupted, and .*\.\n", capfd.readouterr().err)


@pytest.mark.usefixtures("world_of_one")
def test_the_version_is_the_packages(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version") == 0
    assert capfd.readouterr().out == f"qsdp {project['version']}\n"
    assert qsdp.__version__ == project["version"]
    module, _, name = project["scripts"]["qsdp"].partition(":")
    assert getattr(import_module(module), name) is program.main


@pytest.mark.parametrize("name", program.COMMANDS)
def test_a_command_gets_its_flags(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(f"qsdp.commands.{name}.main", lambda: seen.append([*sys.argv]))
    assert run(name, "--out", "a b", "--help") == 0
    assert seen == [[f"qsdp {name}", "--out", "a b", "--help"]]


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", ["prepare", "compress", "export"])
def test_what_is_one_process_refuses_ranks(
    run: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {"prepare": ["--texts", "a.txt"], "compress": ["a", "--sparsity", "0.5"]}
    assert run(name, *flags.get(name, ["a"]), "--out", "b") == 2
    said = capfd.readouterr().err
    assert_is_one_sentence(said)
    assert "this command is one process" in said


def test_documents_name_commands_that_exist() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    named = {name for text in texts for name in re.findall(r"(?m)(?:-m |`|^ +)qsdp (\w+)", text)}
    assert named == {*program.COMMANDS}
