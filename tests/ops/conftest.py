"""What the tests of operators share."""

from __future__ import annotations

import secrets

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a new seed; pytest shows the seed when the test fails."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
