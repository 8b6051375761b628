"""Train a GPT: ``torchrun --nproc-per-node 2 launch/train_gpt.py --help`` explains each flag."""

from __future__ import annotations

from qsdp.commands.exit import run
from qsdp.commands.train import main

if __name__ == "__main__":
    run(main)
