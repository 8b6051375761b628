"""Loss and perplexity over targets: ``launch/evaluate.py --help`` explains each flag."""

from __future__ import annotations

from qsdp.commands.evaluate import main
from qsdp.commands.exit import run

if __name__ == "__main__":
    run(main)
