"""Compress a training checkpoint in one shot: `launch/compress.py --help` explains each flag."""

from qsdp.train.cli import run
from qsdp.train.compress_cli import main

if __name__ == "__main__":
    run(main)
