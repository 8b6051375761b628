"""Train a GPT: `torchrun --nproc-per-node 2 launch/train_gpt.py --help` explains each flag."""

from qsdp.train.cli import main

if __name__ == "__main__":
    main()
