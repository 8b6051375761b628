"""Compress a training checkpoint in one shot: ``launch/compress.py --help`` explains each flag."""

from __future__ import annotations

from qsdp.commands.compress import main
from qsdp.commands.exit import run

if __name__ == "__main__":
    run(main)
