"""No file of the project reads in a way that can run what it reads."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


# What runs what it reads, unless it is told not to. Only ``safe_dcp.py`` and ``dcp_table.py`` in
# qsdp/checkpoint stand over it.
RUNS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "yaml.load", "eval", "exec"),
    *("dcp.load", "FileSystemReader", "DefaultLoadPlanner", "joblib.load", "runpy.run_path"),
}


def runs_what_it_reads(source: str) -> list[str]:
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        told = {word.arg: ast.unparse(word.value) for word in call.keywords}
        is_told = told.get("weights_only") == "True" or {"planner", "storage_reader"} <= told.keys()
        allows = told.get("allow_pickle") == "True"
        if (name in RUNS and not is_told) or allows:
            found.append(name)
    return found


def test_nothing_else_reads_in_a_way_that_runs() -> None:
    for call in ("torch.load(f)", "pickle.loads(b)", "np.load(f, allow_pickle=True)", "eval(x)"):
        assert runs_what_it_reads(call)
    files = [file for part in ("qsdp", "launch", "benchmarks") for file in (ROOT / part).rglob("*")]
    found = {
        str(file.relative_to(ROOT)): calls
        for file in files
        if file.suffix == ".py" and (calls := runs_what_it_reads(file.read_text()))
    }
    assert found == {}
