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
    """See ``shorten_ends``."""
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


@pytest.fixture
def gloo_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine could do at best is not measured at the end of a run."""
    monkeypatch.setattr("qsdp.train.after_training.matmul_flops_per_s", lambda *_: 1e9)
