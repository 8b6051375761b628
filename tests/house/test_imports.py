"""The house rules that imports must keep.

Rooms and files import one way, one room knows private torch, and a name leads to one file.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qsdp"

# What each room of qsdp may import besides itself and those FOR_ANYONE.
MAY_IMPORT: dict[str, set[str]] = {
    "common": {"compat"},
    "compat": set(),
    "config": {"common"},  # without torch: ``tests/commands/test_light_start.py``
    "codec": set(),
    "ops": {"codec"},
    "comm": {"codec", "ops"},
    "fsdp": {"codec", "comm", "ops"},
    "simulation": {"codec", "comm", "ops"},
    "sparsity": {"ops"},
    "methods": {"checkpoint", "sparsity"},
    "optim": {"methods"},
    "models": set(),
    "data": set(),
    "checkpoint": set(),
    "oneshot": {"checkpoint", "ops", "sparsity"},
    "export": {"checkpoint", "data", "models", "oneshot", "sparsity"},
    "report": {"sparsity"},
    # "" is ``qsdp`` itself, whose public names load what they need.
    "train": {
        *("checkpoint", "codec", "comm", "data", "export", "methods", "models", "oneshot", "ops"),
        *("report", "sparsity", ""),
    },
    "commands": {
        *(
            "codec",
            "comm",
            "data",
            "export",
            "methods",
            "models",
            "oneshot",
            "ops",
            "sparsity",
            "train",
            "",
        ),
    },
    "__main__": {"commands", ""},
    "integrations": {"fsdp", "methods", "export", "sparsity", ""},
    # Rooms to come.
    "fisher": {"sparsity"},
    "structured": {"models", "sparsity"},
    "distill": {"models"},
    "layers": {"codec", "ops"},
    "adversary": set(),
}
FOR_ANYONE = {"common", "compat", "config"}
# The public interface.
ABOVE_ALL = {"__init__"}

MOST_LINES = 320
# Rooms that hold one file for each of their kind.
ONE_IN_EACH = {
    *("__init__", "config", "family", "flags", "model", "optimizer", "registry", "report"),
    "schedule",
}


def room_of(path: Path, package: Path) -> str:
    """The room that a file is in: ``codec`` for qsdp/codec/payload.py."""
    return path.relative_to(package).with_suffix("").parts[0]


def module_of(path: Path, package: Path) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every module or ``module.name`` that a file imports, anywhere in it, as an absolute name."""
    own = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + is_package] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports_of(path: Path, package: Path) -> Iterator[str]:
    module, is_package = module_of(path, package), path.stem == "__init__"
    yield from imported_modules(ast.parse(path.read_text()), module, is_package)


def wrong_arrows(package: Path) -> list[str]:
    rooms = {entry.stem for entry in package.iterdir()}
    wrong = []
    for path in sorted(package.rglob("*.py")):
        source = room_of(path, package)
        allowed = MAY_IMPORT.get(source, set()) | {source}
        if source not in FOR_ANYONE:
            allowed |= FOR_ANYONE
        for name in imports_of(path, package):
            head, _, rest = name.partition(".")
            target = rest.split(".")[0] if rest.split(".")[0] in rooms else ""
            if head == package.name and source not in ABOVE_ALL and target not in allowed:
                wrong.append(f"{path.relative_to(package)}: {source} imports {target or 'qsdp'}")
    return wrong


def circle(package: Path) -> list[str]:
    """Files that import each other in a ring, the first of which is named again at its end.

    A package stands for its own ``__init__``; what is imported inside a function counts.
    """
    modules = {module_of(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = {_file(name, modules) for name in imports_of(path, package)} - {module, ""}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _file(name: str, modules: Mapping[str, Path]) -> str:
    """The module that an imported name is, or lies in; "" for one of others."""
    parent = name.rpartition(".")[0]
    return next((each for each in (name, parent) if each in modules), "")


def twice(names: Iterable[str]) -> list[str]:
    return sorted(name for name, num in Counter(names).items() if num > 1)


def is_private(name: str) -> bool:
    return any(
        part.startswith("_") and not (part.startswith("__") and part.endswith("__"))
        for part in name.split(".")
    )


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` for a chain of attributes that starts at a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def private_torch_names(tree: ast.AST) -> set[str]:
    """Private names of torch that a file imports, or reaches through what it imports."""
    meaning = {}  # what a name in this file stands for
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                meaning[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found.add(f"{node.module}.{alias.name}")
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := dotted(node)):
            head, _, rest = chain.partition(".")
            if head in meaning:
                found.add(f"{meaning[head]}.{rest}")
    # torch.ops.<library> holds the operators of whoever registered them.
    return {
        name
        for name in found
        if name.split(".")[0] == "torch" and is_private(name) and not name.startswith("torch.ops.")
    }


def test_imports_go_one_way() -> None:
    assert wrong_arrows(PACKAGE) == []


def test_no_files_import_each_other() -> None:
    assert circle(PACKAGE) == []


def test_every_room_has_its_place_in_the_rule() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert files
    assert {room_of(path, PACKAGE) for path in files} <= MAY_IMPORT.keys() | ABOVE_ALL


def test_a_name_leads_to_one_file() -> None:
    for tree, allowed in (("qsdp", ONE_IN_EACH), ("benchmarks", {"__init__"})):
        names = [path.stem for path in (ROOT / tree).rglob("*.py")]
        assert names
        assert set(twice(names)) <= allowed, tree


def test_a_file_is_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert lengths
    too_long = [f"{path.relative_to(ROOT)}: {n}" for path, n in lengths.items() if n > MOST_LINES]
    assert too_long == []


def test_only_compat_knows_private_torch_names() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if PACKAGE / "compat" not in (path.with_suffix(""), path.parent)
        for name in private_torch_names(ast.parse(path.read_text()))
    }
    assert sorted(found) == []


def make_package(tmp_path: Path, **files: str) -> Path:
    """A package of rooms, with these files: ``comm_group_plan`` is comm/group_plan.py."""
    package = tmp_path / "qsdp"
    for room in ("codec", "comm", "fsdp", "methods"):
        (package / room).mkdir(parents=True, exist_ok=True)
        (package / room / "__init__.py").touch()
    for name, text in files.items():
        room, _, stem = name.partition("_")
        (package / room / f"{stem}.py").write_text(text)
    return package


@pytest.mark.parametrize(
    "line",
    [
        "import qsdp.fsdp",
        "from qsdp import fsdp",
        "from qsdp.fsdp.gather_hook import AllGatherHook",
        "from .. import fsdp",
        "from ..fsdp import hooks",
        "def later():\n    from qsdp.fsdp import hooks",
        "import qsdp",
        "from qsdp import install",
        "from qsdp.methods import cram",
    ],
)
def test_an_arrow_that_goes_back_is_seen(tmp_path: Path, line: str) -> None:
    right = "from ..codec import payload\nfrom . import all_gather\n"
    assert wrong_arrows(make_package(tmp_path, comm_group_plan=right)) == []
    assert len(wrong_arrows(make_package(tmp_path, comm_group_plan=line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from qsdp.comm import clock as clock",
        "from qsdp.comm.clock import Clock",
        "import qsdp.comm.clock",
        "from . import clock",
        "def later():\n    from .clock import Clock",
    ],
)
def test_a_circle_between_files_is_seen(tmp_path: Path, line: str) -> None:
    one_way = make_package(tmp_path, comm_clock="from qsdp.comm import wire", comm_wire="")
    assert circle(one_way) == []
    both = make_package(tmp_path, comm_clock="from qsdp.comm import wire", comm_wire=line)
    assert set(circle(both)) == {"qsdp.comm.clock", "qsdp.comm.wire"}


def test_a_circle_through_a_room_is_seen(tmp_path: Path) -> None:
    package = make_package(tmp_path, comm_clock="from qsdp.comm import start")
    assert circle(package) == []
    (package / "comm" / "__init__.py").write_text("from qsdp.comm.clock import start")
    assert set(circle(package)) == {"qsdp.comm", "qsdp.comm.clock"}


@pytest.mark.parametrize(
    "line",
    [
        "import torch._C",
        "from torch.distributed.fsdp._fully_shard import FSDPState",
        "from torch.distributed import _functional_collectives as fc",
        "import torch\ntorch._foreach_mul_([], 2)",
        "import torch.distributed as dist\ndist._get_default_group()",
    ],
)
def test_a_private_torch_name_is_seen(line: str) -> None:
    assert private_torch_names(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.__version__",
        "import torch\ntorch.ops.qsdp._encode",
        "from .hooks import _flatten",
        "class A:\n    def f(self): return self._torch",
    ],
)
def test_a_name_of_ours_is_not_called_private_torch(line: str) -> None:
    assert not private_torch_names(ast.parse(line))
