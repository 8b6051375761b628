"""The house rules that imports must keep: they go one way, and one file knows private torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qsdp"

# What each part of qsdp may import besides itself, `config` and `compat`.
MAY_IMPORT: dict[str, set[str]] = {
    "bitmask": set(),
    "checksum": set(),
    "compat": set(),
    "config": set(),
    "failures": set(),
    "files": set(),
    "meeting": set(),
    "meshes": set(),
    "streams": set(),
    "codec": set(),
    "comm": {"codec"},
    "fsdp": {"codec", "comm"},
    "simulation": {"codec", "comm"},
    "sparsity": {"codec"},
    "optim": {"sparsity"},
    "models": set(),
    "data": set(),
    "checkpoint": set(),
    "export": {"checkpoint", "data", "models", "sparsity"},
    "metrics": set(),
}
FOR_ANYONE = {
    *("bitmask", "checksum", "compat", "config", "failures", "files"),
    *("meeting", "meshes", "streams"),
}
# These stand above all others: the job, and the public interface.
ABOVE_ALL = {"train", "__init__"}


def part_of(path: Path, package: Path) -> str:
    """The part of qsdp that a file belongs to: `codec` for qsdp/ops/reference/codec.py."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_modules(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> Iterator[str]:
    """Every module or `module.name` that a file imports, anywhere in it, as an absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = len(module) - node.level + is_package
            base = list(module[:parents]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def arrows(path: Path, package: Path) -> Iterator[tuple[str, str]]:
    """(importing part, imported part) for every import of qsdp in a file; '' is qsdp itself."""
    module = (package.name, *path.relative_to(package).with_suffix("").parts)
    is_package = module[-1] == "__init__"
    module = module[:-1] if is_package else module
    parts = {entry.stem for entry in package.iterdir()}
    for name in imported_modules(ast.parse(path.read_text()), module, is_package):
        head, _, rest = name.partition(".")
        if head == package.name:
            target = rest.split(".")[0]
            yield part_of(path, package), target if target in parts else ""


def wrong_arrows(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        for source, target in arrows(path, package):
            allowed = MAY_IMPORT.get(source, set()) | FOR_ANYONE | {source}
            if source not in ABOVE_ALL and target not in allowed:
                wrong.append(f"{path.relative_to(package)}: {source} imports {target or 'qsdp'}")
    return wrong


def is_private(name: str) -> bool:
    return any(
        part.startswith("_") and not (part.startswith("__") and part.endswith("__"))
        for part in name.split(".")
    )


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` for a chain of attributes that starts at a plain name."""
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


def test_every_part_of_the_package_has_its_place_in_the_rule() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert files
    assert {part_of(path, PACKAGE) for path in files} <= MAY_IMPORT.keys() | ABOVE_ALL


def test_only_compat_knows_private_torch_names() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if path != PACKAGE / "compat.py"
        for name in private_torch_names(ast.parse(path.read_text()))
    }
    assert sorted(found) == []


@pytest.mark.parametrize(
    "line",
    [
        "import qsdp.fsdp",
        "from qsdp import fsdp",
        "from qsdp.fsdp.hooks import AllGather",
        "from .. import fsdp",
        "from ..fsdp import hooks",
        "def later():\n    from qsdp.fsdp import hooks",
        "import qsdp",
        "from qsdp import install",
        "from qsdp.methods.cram import optimizer as cram",
    ],
)
def test_an_arrow_that_goes_back_is_seen(tmp_path: Path, line: str) -> None:
    package = tmp_path / "qsdp"
    for part in ("codec", "comm", "fsdp", "optim"):
        (package / part).mkdir(parents=True)
    (package / "comm" / "plan.py").write_text("from ..codec import ops\nfrom . import gather\n")
    assert wrong_arrows(package) == []
    (package / "comm" / "plan.py").write_text(line)
    assert len(wrong_arrows(package)) == 1


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
