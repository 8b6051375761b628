"""Fixtures of several files."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.ends import shorten_ends


def pytest_collection() -> None:
    gc.disable()  # thousands of items are looked at again and again while they are made


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def brief_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `shorten_ends`."""
    shorten_ends(monkeypatch)


@pytest.fixture
def load() -> Any:
    """Import a program of benchmarks/, or another module there, by its room and name."""

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return by_name


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not dist.is_initialized()
