"""What a user would run instead of FSDP2 or qsdp: DDP, DDP with PowerSGD, DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.support.steps import LR, Ready, Setting, whole_model, with_adamw


def ddp(*, is_bf16: bool) -> Callable[[Setting], Ready]:
    """DDP with fp32 weights; in bf16 by autocast, its gradients through the bf16 hook."""

    def make(setting: Setting) -> Ready:
        model = DistributedDataParallel(whole_model(setting), gradient_as_bucket_view=True)
        if is_bf16:
            model.register_comm_hook(None, averaged_in_bf16)
        return with_adamw(model, setting, autocast=is_bf16)

    return make


def averaged_in_bf16(_, bucket):  # DDP refuses annotations that are texts
    """Do what torch's bf16_compress_hook does, which it refuses to do over gloo."""
    halves = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(halves, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def powersgd(*, is_bf16: bool) -> Callable[[Setting], Ready]:
    """DDP whose gradients travel as matrices of low rank (Vogels et al., arXiv 1905.13727).

    It is torch's hook as torch advises: error feedback and warm start. Steps before
    ``powersgd_start`` average whole gradients, and the first after them has nothing to start from.

    The hook starts a bucket's later collectives when its earlier ones have ended. Of several
    buckets gloo's threads would do so in another order on each rank, and fail: so there is one.
    """

    def make(setting: Setting) -> Ready:
        whole = whole_model(setting)
        num_mb = 1 + sum(p.numel() * p.element_size() for p in whole.parameters()) // (1 << 20)
        model = DistributedDataParallel(
            whole,
            gradient_as_bucket_view=True,
            bucket_cap_mb=num_mb if setting.device.type == "cpu" else None,
        )
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=setting.powersgd_rank,
            start_powerSGD_iter=setting.powersgd_start,
            use_error_feedback=True,
            warm_start=True,
            random_seed=setting.seed,
            orthogonalization_epsilon=1e-8,  # a column of zeros would become NaN
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        lead_in = setting.powersgd_start + 1
        return with_adamw(model, setting, autocast=is_bf16, lead_in=lead_in)

    return make


def zero3(*, is_bf16: bool) -> Callable[[Setting], Ready]:
    """DeepSpeed ZeRO stage 3 as its documentation sets it up, with torch's AdamW."""

    def make(setting: Setting) -> Ready:
        import deepspeed

        model = whole_model(setting)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        config = {
            "train_micro_batch_size_per_gpu": setting.batch,
            "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": is_bf16},
            "gradient_clipping": 0.0,  # by itself it clips to 1, which no other does
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )

        def step(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
            _, loss = engine(inputs_BT, targets_BT)
            engine.backward(loss)
            engine.step()
            return loss.detach()

        return Ready(model=engine, step=step, optimizer=optimizer)

    return make
