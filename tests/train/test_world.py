"""Which device and backend a process of the training job takes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from qsdp.common.gpu_streams import to_device
from qsdp.common.user_errors import UserError
from qsdp.train.world import World, open_world


def _device(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, local_rank: int, backend: str | None
) -> tuple[torch.device, str]:
    """Of a world that meets on paper only."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.delenv("RANK", raising=False)
    made: list[str] = []
    with (
        mock.patch("torch.cuda.device_count", return_value=num_gpus),
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.cuda.init"),
        mock.patch("qsdp.train.world.dist") as dist,
        mock.patch("qsdp.train.world.DeviceMesh"),
    ):
        dist.init_process_group.side_effect = lambda name, **_: made.append(name)
        with open_world(backend=backend) as world:
            assert isinstance(world, World)
            assert made == [world.backend]
            own = [world.device.index] if world.backend == "nccl" else None
            dist.barrier.assert_called_once_with(device_ids=own)
            return world.device, world.backend


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "backend", "device", "chosen"),
    [
        (0, 3, None, "cpu", "gloo"),
        (0, 3, "gloo", "cpu", "gloo"),
        (4, 3, None, "cuda:3", "nccl"),
        (4, 3, "nccl", "cuda:3", "nccl"),
        (1, 0, "gloo", "cuda:0", "gloo"),
        (1, 3, "gloo", "cuda:0", "gloo"),
        (2, 3, "gloo", "cuda:1", "gloo"),
    ],
)
def test_every_rank_has_a_gpu_of_its_own_or_shares_one_over_gloo(
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    local_rank: int,
    backend: str | None,
    device: str,
    chosen: str,
) -> None:
    found = _device(monkeypatch, num_gpus, local_rank, backend)
    assert found == (torch.device(device), chosen)


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_ranks_that_would_share_a_gpu_over_nccl_are_told_of_gloo(
    monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    with pytest.raises(UserError, match=r"has 1 GPU, .* local rank 1, .* with --backend gloo"):
        _device(monkeypatch, 1, 1, backend)


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="this node has no GPU"):
        _device(monkeypatch, 0, 0, "nccl")


def test_a_batch_on_the_cpu_is_not_copied() -> None:
    batch = torch.zeros(3)
    assert to_device(batch, torch.device("cpu")) is batch
