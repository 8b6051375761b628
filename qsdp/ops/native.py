"""The compiled kernels of csrc/, if the package was built with them, and which kernels serve.

``load`` runs when ``qsdp.ops`` is imported. Kernels are, best first, "avx512", "avx2", "scalar"
(plain C++) and "python" (qsdp/ops/reference, always there). All give the same bytes. GPUs have
those of csrc/cuda, where they were built, or else Python's, which are many times slower: where they
serve since others are missing, the first call says so, in the log ``qsdp``.

Environment: ``QSDP_REQUIRE_NATIVE=1`` refuses to go on without the library, and to work on a GPU
without that of CUDA, which a machine without a GPU need not have;
``QSDP_CPU_CAPABILITY=default|avx2|avx512`` chooses among its kernels, default being scalar.
"""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsdp.common.printing import is_rank_0
from qsdp.common.user_errors import UserError, quoted
from qsdp.ops.schema import KERNELS

LIBRARY = Path(__file__).resolve().parent.parent / "_qsdp_native.so"
CUDA_LIBRARY = LIBRARY.with_name("_qsdp_cuda.so")
PYTHON = "python"
_CAPABILITIES = {"default": "scalar", "avx2": "avx2", "avx512": "avx512"}

_log = logging.getLogger("qsdp")
_library: ctypes.CDLL | None = None
_has_cuda_kernels = False
_override: torch.library.Library | None = None  # while it lives, Python serves the CPU
_stand_ins: list[torch.library.Library] = []  # while they live, they serve what lacks kernels
_told: set[str] = set()  # types of devices whose slow kernels were told of


class UnusableKernels(UserError, RuntimeError):
    """Kernels that are asked for, by the environment or a GPU, and cannot serve."""


def load() -> None:
    """Load the library of native kernels if it is installed, and choose kernels.

    Raises:
        UnusableKernels: The library is required but absent, or does not fit this torch, or
            QSDP_CPU_CAPABILITY names kernels that are unknown or cannot run here.
    """
    global _library, _has_cuda_kernels
    wanted = os.environ.get("QSDP_CPU_CAPABILITY", "")
    if wanted and wanted not in _CAPABILITIES:
        allowed = ", ".join(_CAPABILITIES)
        raise UnusableKernels(
            f"QSDP_CPU_CAPABILITY is {wanted}: give one of {allowed}, or unset it."
        )
    if LIBRARY.exists():
        _register_library(LIBRARY)
        _library = _with_signatures(ctypes.CDLL(str(LIBRARY)))
    elif _is_required():
        raise UnusableKernels(f"QSDP_REQUIRE_NATIVE is 1, but {_missing('cpu')}, or unset it.")
    else:
        _stand_in("cpu", _say_and_serve)
    if torch.version.cuda is not None and CUDA_LIBRARY.exists():
        _register_library(CUDA_LIBRARY)
        _has_cuda_kernels = True
    else:
        # Not an error yet: whether tensors on a GPU will come is not known.
        _stand_in("cuda", _refuse_gpu_tensors if _is_required() else _say_and_serve)
    if wanted and _CAPABILITIES[wanted] not in available():
        raise UnusableKernels(
            f"QSDP_CPU_CAPABILITY is {wanted}, which cannot run here: "
            f"give one of {', '.join(available())}, or unset it."
        )
    if wanted:
        use(_CAPABILITIES[wanted])


def available() -> tuple[str, ...]:
    """The native kernels that this machine can run, best first; the last is "python"."""
    if _library is None:
        return (PYTHON,)
    return (*_library.qsdp_cpu_available().decode().split(","), PYTHON)


def capability() -> str:
    """The native kernels that serve the CPU: "avx512", "avx2", "scalar" or "python"."""
    if _library is None or _override is not None:
        return PYTHON
    return str(_library.qsdp_cpu_in_use().decode())


def has_cuda_kernels() -> bool:
    """Whether there is a GPU, and the CUDA library of native kernels."""
    return _has_cuda_kernels and torch.cuda.is_available()


def serving(device: torch.device) -> str:
    """The kernels, native or not, that serve tensors of ``device``.

    As ``capability`` has it; on a GPU "cuda sm_90" or the like, or "python".

    Raises:
        UnusableKernels: The CUDA library cannot serve this GPU, or is required but absent.
    """
    if device.type == "cpu":
        return capability()
    if not _has_cuda_kernels:
        if _is_required():
            _refuse_gpu_tensors()
        return PYTHON
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if not _runs_on(device):
        raise UnusableKernels(
            f"{CUDA_LIBRARY.name} has no kernels for this GPU ({architecture}): install qsdp again "
            "with CUDAARCHS=native in the environment."
        )
    return f"cuda {architecture}"


def remark(device: torch.device) -> str:
    """Which kernels, native or not, serve ``device``, in words; why, and what to do where slow."""
    kernels = serving(device)
    if kernels != PYTHON:
        return f"kernels: {kernels}"
    is_chosen = device.type == "cpu" and _library is not None
    why = "chosen by native.use" if is_chosen else _missing(device.type)
    return f"SLOW kernels: plain PyTorch's, many times slower than compiled ones ({why})"


def say_no_more() -> None:
    """On rank 0, which then prints ``remark``, log no line of native kernels that are missing."""
    if is_rank_0():
        _told.update(("cpu", "cuda"))


def use(capability: str) -> None:
    """Choose native kernels, for tests and benchmarks; not while the codec runs in another thread.

    Raises:
        ValueError: ``capability`` is not one of ``available``.
    """
    global _override
    if capability not in available():
        raise ValueError(
            f"no {capability} kernels can run here: give one of {', '.join(available())}."
        )
    _override = None
    if _library is None:
        return
    if capability != PYTHON:
        _library.qsdp_cpu_use(capability.encode())
        return
    _override = torch.library.Library("qsdp", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden: it is meant
        for name, kernel in KERNELS.items():
            _override.impl(name, kernel, "CPU")


def _is_required() -> bool:
    return os.environ.get("QSDP_REQUIRE_NATIVE") == "1"


def _missing(device_type: str) -> str:
    """Which library is not there, and what to do."""
    library, tools = LIBRARY, "torch and a C++20 compiler are"
    if device_type != "cpu":
        library, tools = CUDA_LIBRARY, "nvcc and a torch that knows CUDA are"
    return (
        f"{library.name} is not in {library.parent}: install qsdp from a wheel that has it, or "
        f"with pip's --no-build-isolation where {tools}"
    )


def _stand_in(device_type: str, serve: Callable[..., None]) -> None:
    """Have ``serve`` called with a device's type, a kernel, and the arguments for that."""
    library = torch.library.Library("qsdp", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, partial(serve, device_type, kernel), device_type.upper())
    _stand_ins.append(library)


def _say_and_serve(device_type: str, kernel: Callable[..., None], *args: Any, **more: Any) -> None:
    if device_type not in _told:
        _told.add(device_type)
        # Once a machine, where the launcher says which rank of it this is.
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            _log.warning("qsdp: %s", remark(torch.device(device_type)))
    kernel(*args, **more)


def _refuse_gpu_tensors(*_: object, **__: object) -> None:
    raise UnusableKernels(f"QSDP_REQUIRE_NATIVE is 1, but {_missing('cuda')}, or unset it.")


def _runs_on(device: torch.device) -> bool:
    """Whether the CUDA library was compiled for this GPU: it has kernels for some alone."""
    value = torch.ones(1, device=device)
    try:
        torch.ops.qsdp.mark_above(value, 0, torch.empty_like(value, dtype=torch.bool))
    except RuntimeError:
        return False
    return True


def _register_library(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise UnusableKernels(
            f"{library.name} does not load with torch {torch.__version__} ({quoted(error)}): "
            "install qsdp again with this torch."
        ) from error


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    library.qsdp_cpu_available.restype = ctypes.c_char_p
    library.qsdp_cpu_in_use.restype = ctypes.c_char_p
    library.qsdp_cpu_use.argtypes = [ctypes.c_char_p]
    return library
