"""Train a GPT: `torchrun --nproc-per-node 2 launch/train_gpt.py --help` explains each flag."""

from qsdp.train.cli import main

if __name__ == "__main__":
    main()
    # Only now: a mistake on the command line is answered before torch is loaded.
    from qsdp.train.world import end_process

    end_process(0)
