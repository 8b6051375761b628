"""Train a GPT: `torchrun --nproc-per-node 2 launch/train_gpt.py --help` explains each flag."""

import sys

from qsdp.train.cli import main

if __name__ == "__main__":
    status: object = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    if "torch" in sys.modules and (status is None or isinstance(status, int)):
        # Only now: a mistake on the command line is answered before torch is loaded.
        from qsdp.train.world import end_process

        end_process(status or 0)
    raise SystemExit(status)
