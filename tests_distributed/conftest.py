"""Fixtures of several files: calls and commands on every rank of a small gloo world."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests_distributed.jobs import Jobs
from tests_distributed.pool import Pools

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run(world_size, function, *args)`: see `Pools.run`."""
    pools = Pools(tmp_path_factory.mktemp("pools"))
    yield pools.run
    pools.close()
    if folder := os.environ.get("QSDP_TEST_REPORT"):
        Path(folder, f"pool-{os.getpid()}.json").write_text(
            json.dumps({"max_threads": pools.max_threads})
        )


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Run the trainer's commands: see `Jobs`."""
    return Jobs(tmp_path_factory.mktemp("jobs"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="run test_combinations.py on all combinations, not on a pairwise selection",
    )
