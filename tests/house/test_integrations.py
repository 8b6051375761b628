"""The room of adapters: each file short, lazy and with an extra; what is missing is said."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsdp import integrations
from tests.house.test_imports import PACKAGE, ROOT, imports_of

MOST_LINES = 150


def wrong_adapters(package: Path, extras: set[str]) -> list[str]:
    """What is wrong with a package's room of adapters, or with who imports it."""
    wrong = []
    for path in sorted((package / "integrations").glob("*")):
        if path.name in ("__init__.py", "__pycache__"):
            continue
        if path.suffix != ".py":
            wrong.append(f"{path.name}: an adapter is one file")
        elif path.stem not in extras:
            wrong.append(f"{path.name}: pyproject.toml has no extra {path.stem!r}")
        elif (num := len(path.read_text().splitlines())) > MOST_LINES:
            wrong.append(f"{path.name}: {num} lines")
    for path in package.rglob("*.py"):
        if path.parent != package / "integrations":
            names = imports_of(path, package)
            if any(f"{name}.".startswith(f"{package.name}.integrations.") for name in names):
                wrong.append(f"{path.relative_to(package)} imports an adapter")
    return wrong


def test_an_adapter_is_short_has_an_extra_and_is_imported_by_nobody() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wrong_adapters(PACKAGE, {*extras["optional-dependencies"]}) == []


def test_an_adapter_that_breaks_a_rule_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "qsdp"
    for room in ("integrations", "train"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    (package / "integrations" / "wand.py").write_text("\n" * MOST_LINES)
    assert wrong_adapters(package, {"wand"}) == []
    assert wrong_adapters(package, {"dev"}) == ["wand.py: pyproject.toml has no extra 'wand'"]
    (package / "integrations" / "wand.py").write_text("\n" * (MOST_LINES + 1))
    (package / "integrations" / "more").mkdir()
    (package / "train" / "loop.py").write_text("from qsdp import integrations")
    (package / "train" / "job.py").write_text("def f(): import qsdp.integrations.wand")
    assert len(wrong_adapters(package, {"wand"})) == 4


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the room looks for adapters in, beside libraries that they may import."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    libraries = tmp_path / "libraries"
    (libraries / "whole_library").mkdir(parents=True)
    (libraries / "whole_library" / "__init__.py").write_text("VALUE = 5")
    (libraries / "torn_library.py").write_text("import its_dependency")
    monkeypatch.setattr(integrations, "__path__", [str(folder)])
    monkeypatch.syspath_prepend(str(libraries))
    before = {*sys.modules}
    yield folder
    for name in {*sys.modules} - before:
        del sys.modules[name]
        vars(integrations).pop(name.removeprefix("qsdp.integrations."), None)


def test_an_adapter_is_listed_and_loads_when_it_is_asked_for(adapters: Path) -> None:
    (adapters / "first_one.py").write_text("from whole_library import VALUE")
    (adapters / "second_one.py").write_text("raise SystemExit('it was loaded')")
    assert {"first_one", "second_one"} <= {*dir(integrations)}
    assert integrations.first_one.VALUE == 5  # type: ignore[attr-defined]
    assert "qsdp.integrations.first_one" in sys.modules
    assert "qsdp.integrations.second_one" not in sys.modules


def test_an_adapter_that_there_is_not_is_named_with_those_there_are(adapters: Path) -> None:
    with pytest.raises(AttributeError, match="no_one is no adapter that is there: add it"):
        integrations.no_one  # noqa: B018
    (adapters / "first_one.py").touch()
    with pytest.raises(AttributeError, match="that is there: choose first_one"):
        integrations.no_one  # noqa: B018


@pytest.mark.parametrize("line", ["import lost_library", "from lost_library.trainer import Hook"])
def test_a_library_that_is_not_installed_is_said_in_one_sentence(adapters: Path, line: str) -> None:
    (adapters / "lost.py").write_text(line)
    said = r"^qsdp.integrations.lost needs lost_library, .*: run 'pip install qsdp\[lost\]'\.$"
    with pytest.raises(ImportError, match=said):
        integrations.lost  # noqa: B018
    with pytest.raises(ImportError, match=said):
        exec("from qsdp.integrations import lost")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import torn_library", "No module named 'its_dependency'"),
        ("from whole_library import missing", "cannot import name 'missing'"),
        ("import whole_library.missing", "No module named 'whole_library.missing'"),
        ("raise ImportError('too old')", "too old"),
    ],
)
def test_an_error_inside_a_library_is_not_masked(adapters: Path, line: str, said: str) -> None:
    (adapters / "adapter.py").write_text(line)
    with pytest.raises(ImportError, match=said):
        integrations.adapter  # noqa: B018


def test_the_room_itself_loads_no_library() -> None:
    code = "import sys, qsdp.integrations; dir(qsdp.integrations); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout == "False\n", ended.stderr
