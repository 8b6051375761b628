"""Train a GPT: `torchrun --nproc-per-node 2 launch/train_gpt.py --help` explains each flag."""

from qsdp.train.cli import main, run

if __name__ == "__main__":
    run(main)
