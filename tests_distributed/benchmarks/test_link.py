"""Losses of benchmarks/wire/link.py are of the same training, whoever takes it."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsdp.common.json_files import write_json
from tests_distributed.support.running import Run

SAME = ["alone-fp32", "fsdp-fp32", "ddp-fp32", "qsdp-w32g32-once-fp32"]
CODED = ["ddp-powersgd-fp32", "qsdp-w4g4-once-fp32"]


def _losses(text: Path, out: Path) -> None:
    from benchmarks.support import losses, steps
    from benchmarks.support.ranks import Ranks

    arguments = argparse.Namespace(
        contestants=[*SAME, *CODED], without=[], device="cpu", powersgd_rank=1, groups=0
    )
    arguments.data, arguments.out = str(text), out
    arguments.loss_model, arguments.loss_steps, arguments.loss_tokens = "1m", 5, 64
    arguments.loss_evals = arguments.loss_seed = 0
    size = dist.get_world_size()
    own = init_device_mesh("cpu", (size, 1), mesh_dim_names=("ranks", "self"))["self"]
    ranks = Ranks(
        rank=dist.get_rank(),
        size=size,
        device=torch.device("cpu"),
        control=dist.group.WORLD,
        mesh=init_device_mesh("cpu", (size,)),
        alone=own,
    )
    tiny = mock.patch.dict(steps.MODELS, {"1m": (1, 64)})
    with tiny, mock.patch.object(losses, "EVAL_TOKENS", 256):
        losses.train_all(arguments, ranks)


def test_contestants_that_lose_no_bits_have_the_same_loss(run: Run, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "losses.json"
    text.write_text("".join(random.choices("to be or not\n", k=4000)))
    write_json(out, {"settings": {}, "rows": {}})
    run(2, _losses, text, out)
    rows = json.loads(out.read_text())["rows"]
    for kind in ("train_loss", "val_loss"):
        floor = rows[SAME[0]][kind]
        assert all(math.isclose(rows[name][kind], floor, rel_tol=1e-5) for name in SAME)
        assert all(0.8 < rows[name][kind] / floor < 1.2 for name in CODED)
        assert len({rows[name][kind] for name in [SAME[0], *CODED]}) == 3
