"""Every method over models whose ranks own different experts."""

from __future__ import annotations

from torch import Tensor

import qsdp
from qsdp.methods.acdc.optimizer import ACDC
from qsdp.methods.cram.optimizer import CrAM
from qsdp.methods.gmp.optimizer import GMP
from qsdp.methods.sam.optimizer import SAM
from tests.support.cram_reference import top_k_masks
from tests_distributed.support.experts import LAYOUTS, Method, Together

PHASES = qsdp.ACDCSchedule(steps=6, warmup=1, phase=2, last_dense=1, last_sparse=1)
GRADUAL = qsdp.GMPSchedule(steps=4, sparsity=0.8, initial=0.3, start=1, every=1, end=3)
METHODS: dict[str, Method] = {
    "CrAM+": Method(make=CrAM, options={"sparsity": (0.6, "0.5+4bit")}),
    "CrAM": Method(make=CrAM, options={"plus": False, "max_norm": 0.05, "sparsity": 0.7}),
    "CrAM, normalized": Method(make=CrAM, options={"normalize": True, "sparse_grad": False}),
    "CrAM by layer": Method(make=CrAM, options={"sparsity": "0.7+layer"}),
    "CrAM of experts": Method(make=CrAM, options={"sparsity": 0.6}, prunes="experts"),
    "CrAM around experts": Method(
        make=CrAM,
        options={"normalize": True, "max_norm": 0.02, "sparsity": 0.6},
        prunes="experts",
        base_has="experts",
    ),
    "SAM": Method(make=SAM, options={"rho": 0.1, "max_norm": 0.05}, prunes=None),
    "ACDC": Method(make=ACDC, options={"schedule": PHASES, "max_norm": 0.05}, steps=6),
    "ACDC around experts": Method(
        make=ACDC,
        options={"schedule": PHASES, "target": "0.7", "max_norm": 0.02},
        steps=6,
        prunes="experts",
        base_has="experts",
    ),
    "GMP": Method(make=GMP, options={"schedule": GRADUAL, "max_norm": 0.05}, steps=4),
    "GMP by layer": Method(make=GMP, options={"schedule": GRADUAL, "scope": "layer"}, steps=4),
}
NAMES = tuple(LAYOUTS)
# The wire wants them so.
EVEN = ("two of two", "a rank each", "replicas")


def expected_masks(together: Together, names: list[str], sparsity: float) -> dict[str, Tensor]:
    tensors = [together.get_parameter(name).detach() for name in names]
    total = sum(tensor.numel() for tensor in tensors)
    masks = top_k_masks(tensors, total - round(sparsity * total))
    return dict(zip(names, masks, strict=True))
