"""Where the project and its training command are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train_gpt.py"
