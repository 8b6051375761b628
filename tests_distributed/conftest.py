"""Fixtures of several files: calls and commands on every rank of a small gloo world."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests_distributed.support.jobs import Jobs
from tests_distributed.support.pool import Pools, preloaded
from tests_distributed.support.running import Run


def pytest_configure() -> None:
    """Let nothing that tests start take the core from another process the moment it wakes up."""
    # While one thread sends, gloo's own asks without end whether it may go on. Where the sender
    # lost its core to the rank that it woke, that is a core for a whole time slice.
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """``run(world_size, function, *args)``: see ``Pools.run``."""
    pools = Pools(tmp_path_factory.mktemp("pools"))
    yield pools.run
    pools.close()
    _report("pool", pools.max_threads)


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Run the trainer's commands: see ``Jobs``."""
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    _report("pool-jobs", jobs.max_threads)


def _report(name: str, max_threads: int) -> None:
    if folder := os.environ.get("QSDP_TEST_REPORT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        report = json.dumps({"max_threads": max_threads})
        Path(folder, f"{name}-{os.getpid()}.json").write_text(report)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="run every variant: not a pairwise selection, and what is marked heavy",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes as slow, and leave out heavy variants unless all are asked for."""
    modules = set()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            modules.add(item.getparent(pytest.Module).module)
    for module in modules:
        # PRELOADED of a test module: what else its functions import.
        preloaded.extend([*getattr(module, "PRELOADED", ()), module.__name__])
    if config.getoption("--all-combinations"):
        return
    heavy = [item for item in items if item.get_closest_marker("heavy")]
    config.hook.pytest_deselected(items=heavy)
    items[:] = [item for item in items if item not in heavy]
