"""Loss and perplexity over targets: `launch/evaluate.py --help` explains each flag."""

from qsdp.train.cli import run
from qsdp.train.evaluate_cli import main

if __name__ == "__main__":
    run(main)
