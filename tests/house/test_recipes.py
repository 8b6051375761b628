"""Every recipe of docs/extend adds what it says, by its steps alone.

One recipe: python -m pytest tests/house/test_recipes.py -k "solver"
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.house.test_imports import circle, wrong_arrows
from tests.support.recipes import Recipe, RecipeError, read, run, table

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "extend.md"
RECIPES = [
    recipe
    for path in sorted((ROOT / "docs" / "extend").glob("*.md"))
    for recipe in read(path.read_text(), path.relative_to(ROOT).as_posix())
]

A_RECIPE = """# Title

## A thing

1. Write it:

   ```python new=qsdp/things/new.py
   VALUE = 1
   ```

2. Say where it is:

   ```python file=qsdp/things/registry.py after="THINGS = {"
       "new": 1,
   ```

   ```python file=launch/thing.py replace='print("old")'
   print("## no heading")
   ```

```bash run
python launch/thing.py
```
"""


def marked(recipe: Recipe) -> object:
    return pytest.param(recipe, id=recipe.title, marks=[pytest.mark.slow, pytest.mark.recipe])


@pytest.mark.parametrize("recipe", [marked(recipe) for recipe in RECIPES])
def test_a_recipe_adds_what_it_says(recipe: Recipe, tmp_path: Path) -> None:
    without, extended = (recipe.copy(ROOT, tmp_path / name) for name in ("without", "extended"))
    code = "import qsdp.config; print(qsdp.__file__, qsdp.config.__file__)"
    for tree in (without, extended):
        found = run([sys.executable, "-c", code], tree).stdout.split()
        assert found == [f"{tree}/qsdp/__init__.py", f"{tree}/qsdp/config.py"]
    for use in recipe.uses:
        ended = use.run(without)
        assert ended.returncode != 0, f"{use.place} needs no extension:\n{ended.stdout[-3000:]}"
    for step in recipe.steps:
        step.apply(extended)
    assert wrong_arrows(extended / "qsdp") == []
    assert circle(extended / "qsdp") == []
    for use in recipe.uses:
        ended = use.run(extended)
        assert ended.returncode == 0, f"{use.place} ended so:\n{ended.stdout[-6000:]}"


def test_ranks_that_a_recipe_starts_leave_as_those_of_commands_do() -> None:
    """Where they tear Python down while gloo's threads hold tensors, torch 2.13 may abort."""
    starting = [
        use for recipe in RECIPES for use in recipe.uses if "torch.multiprocessing" in use.text
    ]
    assert len(starting) >= 2
    assert [use.place for use in starting if "end_process(0)" not in use.text] == []


def test_the_table_says_how_many_files_each_recipe_touches_and_which_are_there_before() -> None:
    rows = table(DOCUMENT.read_text())
    counts = {name: count for name, (count, _) in rows.items()}
    assert counts == {recipe.title.lower(): len(recipe.files) for recipe in RECIPES}
    for recipe in RECIPES:
        named = set(re.findall(r"`([^`]+)`", rows[recipe.title.lower()][1]))
        assert recipe.edited <= named, recipe.title


def test_a_step_does_what_its_block_says(tmp_path: Path) -> None:
    (recipe,) = read(A_RECIPE, "it.md")
    assert (recipe.title, len(recipe.files), len(recipe.edited)) == ("A thing", 3, 2)
    (tmp_path / "launch").mkdir()
    (tmp_path / "qsdp" / "things").mkdir(parents=True)
    registry, program = tmp_path / "qsdp/things/registry.py", tmp_path / "launch/thing.py"
    registry.write_text("THINGS = {\n}\n")
    program.write_text('a\nprint("old")\nb')
    for step in recipe.steps:
        step.apply(tmp_path)
    assert (tmp_path / "qsdp/things/new.py").read_text() == "VALUE = 1\n"
    assert registry.read_text() == 'THINGS = {\n    "new": 1,\n}\n'
    assert program.read_text() == 'a\nprint("## no heading")\nb'
    assert [use.text for use in recipe.uses] == ["python launch/thing.py\n"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"it.md:13: there is no file qsdp/things/registry.py"),
        ("THINGS = [\n", r"it.md:13: 0 lines of qsdp/things/registry.py have 'THINGS = {'"),
        ("THINGS = {\n" * 2, r"it.md:13: 2 lines of qsdp/things/registry.py have"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    tmp_path: Path, content: str | None, said: str
) -> None:
    (recipe,) = read(A_RECIPE, "it.md")
    new, after, _ = recipe.steps
    new.apply(tmp_path)
    with pytest.raises(RecipeError, match=r"new=qsdp/things/new.py exists already"):
        new.apply(tmp_path)
    if content is not None:
        (tmp_path / after.path).write_text(content)
    with pytest.raises(RecipeError, match=said):
        after.apply(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("python new=qsdp/things/new.py", "python", "it.md:7: a block with the info string 'pyt"),
        ("python new=qsdp/", "python old=qsdp/", "it.md:7: a block with the info string"),
        ("bash run", "toml run", "it.md:21: a block with the info string 'toml run'"),
        ("bash run", "bash run now", "it.md:21: a block with the info string"),
        ('"THINGS = {"', '"THINGS = {', "it.md:13: a block with the info string"),
        ("new=qsdp", "new=../qsdp", "it.md:7: .* not inside the tree"),
        ("## A thing\n", "", "it.md:6: a block before the first recipe"),
        ("bash run", "bash new=a", "'A thing' lacks steps, or their use"),
        ("thing.py\n```\n", "thing.py\n", "it.md:21: a block without end"),
        ("python new=qsdp/things/new.py", "bash run", "it.md:13: a step after the use of 'A th"),
    ],
)
def test_a_block_that_does_not_say_what_it_is_for_is_refused(old: str, new: str, said: str) -> None:
    assert A_RECIPE.count(old) == 1
    with pytest.raises(RecipeError, match=said):
        read(A_RECIPE.replace(old, new), "it.md")


def test_a_copy_is_used_whatever_else_is_installed(tmp_path: Path) -> None:
    """An editable install puts a finder before all paths: this one stands for it."""
    tree = tmp_path / "tree"
    (tree / "qsdp").mkdir(parents=True)
    (tree / "qsdp" / "__init__.py").touch()
    (tree / "qsdp" / "own.py").write_text("VALUE = 3")
    code = """
import sys
from importlib.util import spec_from_file_location
class Elsewhere:
    def find_spec(name, path=None, target=None):
        if name.startswith("qsdp"):
            return spec_from_file_location(name, "/nowhere.py")
sys.meta_path.insert(1, Elsewhere)
from qsdp.own import VALUE
print(VALUE)
"""
    ended = run([sys.executable, "-c", code], tree)
    assert (ended.returncode, ended.stdout) == (0, "3\n")
