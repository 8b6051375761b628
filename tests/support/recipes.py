"""The recipes of docs/extend: read, and carried out in a copy of the tree.

A recipe is a section ``## TITLE``. Its fenced blocks say by their info strings what is done with
them, in this order:

python new=PATH                     the block becomes a new file
python file=PATH after="TEXT"       its lines come after the only line of the file that has TEXT
python file=PATH replace="TEXT"     they replace that line
bash run, python run                is run in the copy's root, and ends with status 0 once the steps
                                    above are taken, and with another one if they are not

The first word of a step is the language that is shown, any one. TEXT may stand in single quotes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.support import patience

NATIVE = ("csrc", "CMakeLists.txt", "README.md", "LICENSE")
"""What a build of the native library reads, beside what every copy has."""
_EVERY = ("qsdp", "launch", "pyproject.toml")
_STARTED_BY_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# An editable install of qsdp has a finder of its own, which is asked before PYTHONPATH.
_SITE = """
import sys
from importlib.machinery import PathFinder

class OfTheCopy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "qsdp":
            return PathFinder.find_spec(name, [{copy!r}] if path is None else path, target)

sys.meta_path.insert(0, OfTheCopy)
"""


class RecipeError(ValueError):
    """A recipe that cannot be carried out as it stands."""


@dataclass(frozen=True)
class Step:
    """A file that is made, or lines that are put into one."""

    place: str
    """Of the block in its document, for messages."""
    kind: str
    """``new``, ``after`` or ``replace``."""
    path: str
    anchor: str
    text: str

    def apply(self, tree: Path) -> None:
        """Take the step in the copy ``tree``. Raises RecipeError if it does not fit."""
        file = tree / self.path
        if self.kind == "new":
            if file.exists():
                raise RecipeError(f"{self.place}: new={self.path} exists already")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.text)
            return
        if not file.is_file():
            raise RecipeError(f"{self.place}: there is no file {self.path}")
        lines = file.read_text().splitlines(keepends=True)
        hits = [number for number, line in enumerate(lines) if self.anchor in line]
        if len(hits) != 1:
            raise RecipeError(
                f"{self.place}: {len(hits)} lines of {self.path} have {self.anchor!r}: name one"
            )
        begin = hits[0] + (self.kind == "after")
        lines[begin : hits[0] + 1] = self.text.splitlines(keepends=True)
        file.write_text("".join(lines))


@dataclass(frozen=True)
class Use:
    """How the extension is used, once it is there."""

    place: str
    language: str
    text: str

    def run(self, tree: Path) -> subprocess.CompletedProcess[str]:
        """Run it in the copy ``tree``, whose qsdp is imported whatever else is installed."""
        command = ["bash", "-euo", "pipefail", "-c", self.text]
        if self.language == "python":  # a file, so that its processes can start others of it
            (tree / "use_of_recipe.py").write_text(self.text)
            command = [sys.executable, "use_of_recipe.py"]
        return run(command, tree)


@dataclass
class Recipe:
    title: str
    steps: list[Step] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        """All that it touches."""
        return {step.path for step in self.steps}

    @property
    def edited(self) -> set[str]:
        """Of these, those that are there before."""
        return self.files - {step.path for step in self.steps if step.kind == "new"}

    @property
    def is_native(self) -> bool:
        return any(path.startswith("csrc/") for path in self.files)

    def copy(self, root: Path, tree: Path) -> Path:
        """Copy to ``tree`` what the recipe needs of the tree at ``root``, without its steps."""
        has_tests = any(path.startswith("tests/") for path in self.files)
        for name in (
            *_EVERY,
            *(NATIVE if self.is_native else ()),
            *(("tests",) if has_tests else ()),
        ):
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name)
            else:
                shutil.copy(root / name, tree / name)
        return tree


def read(document: str, name: str) -> list[Recipe]:
    """The recipes of a ``document``, which is called ``name``.

    Raises RecipeError for a block whose purpose it does not say, and for a recipe without steps or
    use.
    """
    recipes: list[Recipe] = []
    for place, info, text in _parts(document, name):
        if info is None:
            recipes.append(Recipe(text))
            continue
        if not recipes:
            raise RecipeError(f"{place}: a block before the first recipe")
        recipe = recipes[-1]
        block = _block(place, info, text)
        if isinstance(block, Use):
            recipe.uses.append(block)
        elif recipe.uses:
            raise RecipeError(f"{place}: a step after the use of {recipe.title!r}")
        else:
            recipe.steps.append(block)
    for recipe in recipes:
        if not (recipe.steps and recipe.uses):
            raise RecipeError(f"{name}: {recipe.title!r} lacks steps, or their use")
    return recipes


def table(document: str) -> dict[str, tuple[int, str]]:
    """What the table ``to add | files | which`` says, by its first column."""
    rows = re.findall(r"(?m)^\| *([^|]+?) *\| *(\d+) *\| *([^|]+?) *\|$", document)
    return {name: (int(count), which) for name, count, which in rows}


def run(command: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in the copy ``tree`` with the Python of these tests; its output in one."""
    site = tree.with_name(f"{tree.name}-site")
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE.format(copy=str(tree)))
    kept = {n: v for n, v in os.environ.items() if n not in _STARTED_BY_A_LAUNCHER}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # several processes would compile everything
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"PYTHONPATH": f"{site}{os.pathsep}{tree}", "PATH": path, "OMP_NUM_THREADS": "1"}
    # Kernels that are compiled in half the time give the same bytes.
    own |= {"CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-O1"}
    return subprocess.run(
        command,
        cwd=tree,
        env=kept | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience.seconds(),
        check=False,
    )


def _parts(document: str, name: str) -> Iterator[tuple[str, str | None, str]]:
    """Titles, with None, and the fenced blocks, with their info strings, in order."""
    lines = enumerate(document.splitlines(keepends=True), 1)
    for number, line in lines:
        place = f"{name}:{number}"
        if line.startswith("## "):
            yield place, None, line[3:].strip()
        elif fence := re.match(r"( *)(`{3,})(.*)$", line):
            indent, ticks, info = fence.groups()
            text = ""
            for _, inner in lines:
                if inner.strip() == ticks:
                    break
                text += inner.removeprefix(indent)
            else:
                raise RecipeError(f"{place}: a block without end")
            yield place, info, text


def _block(place: str, info: str, text: str) -> Step | Use:
    try:
        language, *words = shlex.split(info)
        given = dict(word.split("=", 1) for word in words if word != "run")
    except ValueError:
        raise RecipeError(f"{place}: a block with the info string {info!r}") from None
    if words == ["run"] and language in ("bash", "python"):
        return Use(place, language, text)
    for kind, key in (("new", "new"), ("after", "file"), ("replace", "file")):
        if len(words) == len(given) and {*given} == {kind, key}:
            path = PurePosixPath(given[key])
            if path.is_absolute() or ".." in path.parts:
                raise RecipeError(f"{place}: {path} is not inside the tree")
            return Step(place, kind, str(path), given[kind], text)
    raise RecipeError(f"{place}: a block with the info string {info!r}")
