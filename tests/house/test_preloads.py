"""A name that cannot be imported is preloaded in silence: every worker imports by itself then."""

from __future__ import annotations

from importlib.util import find_spec

from tests.support import file_operations
from tests_distributed.support import pool


def test_what_workers_preload_is_there() -> None:
    names = [*pool.preloaded, *file_operations.PRELOADED]
    assert [name for name in names if find_spec(name) is None] == []
