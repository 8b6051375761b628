"""Run by test_cli.py under torchrun: call the training job with bad flags, many times a process.

Usage: refusals.py CASES.json RESULTS, where CASES.json lists for each case the flags of each rank;
flags that begin with the word evaluate are launch/evaluate.py's.
Every rank writes RESULTS-<rank>.json: exit status and standard error of each case. It works in the
folder RESULTS-<rank>, if there is one, as on a node with files of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from qsdp.train import errors, evaluate_cli, world
from qsdp.train.cli import main


def meet_in(store: dist.Store, rank: int, size: int) -> None:
    """Let the next job meet where no job has met before, as under a launcher of its own."""
    world.rendezvous = lambda url, timeout: iter([(store, rank, size)])


def run(cases: list[list[list[str]]]) -> list[tuple[object, str]]:
    errors._PATIENCE_S = 0.0  # no launcher ends this rank when rank 0 has spoken
    store, rank, size = next(rendezvous("env://"))
    if (home := Path(f"{sys.argv[2]}-{rank}")).is_dir():
        os.chdir(home)
    results: list[tuple[object, str]] = []
    for number, flags in enumerate(cases):
        meet_in(dist.PrefixStore(f"case-{number}", store), rank, size)
        said = io.StringIO()
        status: object = 0
        with contextlib.redirect_stderr(said):
            try:
                own = flags[rank]
                if own[:1] == ["evaluate"]:
                    evaluate_cli.main(own[1:])
                else:
                    main(own)
            except SystemExit as stop:
                status = stop.code
        results.append((status, said.getvalue()))
    return results


if __name__ == "__main__":
    found = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(f"{sys.argv[2]}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    world.end_process(0)
