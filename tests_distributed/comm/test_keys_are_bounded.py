"""What the clock keeps of a step's keys while the step does not advance."""

from __future__ import annotations

import torch

import qsdp
from tests_distributed.support.helpers import make_batch, make_model, shard
from tests_distributed.support.running import Run


def _kept_keys() -> list[int]:
    model = shard(make_model(num_layers=1), nested=False)
    handle = qsdp.install(model, qsdp.QSDPConfig(bucket_size=16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    with handle.exact():
        for step in range(8):
            model(*make_batch(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(len(handle._wire.clock._made))
    return kept


def test_training_in_full_precision_keeps_no_more_keys_with_each_step(run: Run) -> None:
    for kept in run(2, _kept_keys):
        assert kept[-1] == kept[3]
