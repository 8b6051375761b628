"""Prove codec, collectives and hooks on the real backend: ``launch/selfcheck.py --help``."""

from __future__ import annotations

from qsdp.commands.exit import run
from qsdp.commands.selfcheck import main

if __name__ == "__main__":
    run(main)
