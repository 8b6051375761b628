"""What is said of a failed collective: that a rank was lost, unless the mistake is its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from qsdp.common.collective_errors import CollectiveError, collective

OWN = [
    RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("invalid argument: tensors must have the same type"),
]
OF_THE_NETWORK = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"),
    dist.DistBackendError("NCCL error"),
    RuntimeError("Wait timeout"),
    RuntimeError("Connection reset by peer"),
]


@pytest.mark.parametrize("error", OWN, ids=str)
def test_an_error_of_this_rank_passes_as_it_is(error: RuntimeError) -> None:
    with pytest.raises(type(error)) as caught, collective("gather"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", OF_THE_NETWORK, ids=str)
def test_a_lost_rank_is_named(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    said = "the gather of the group of a at step 7 failed on rank 3: a rank has ended"
    with pytest.raises(CollectiveError, match=said), collective("gather", ["a"], 7):
        raise error
