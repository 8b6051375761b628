"""The compiled kernels of csrc/, if the package was built with them, and which kernels serve.

`load` runs when `qsdp.codec` is imported. Kernels are, best first, "avx512", "avx2", "scalar"
(plain C++) and "python" (qsdp/codec/ops.py, always there). All give the same bytes. GPUs have those
of csrc/cuda, where they were built, or else Python's.

Environment: ``QSDP_REQUIRE_NATIVE=1`` refuses to go on without the library;
``QSDP_CPU_CAPABILITY=default|avx2|avx512`` chooses among its kernels, default being scalar.
"""

import ctypes
import os
import warnings
from pathlib import Path

import torch

from qsdp.codec import magnitude, ops, sparse  # define the schemas that the library has kernels for

LIBRARY = Path(__file__).resolve().parent.parent / "_qsdp_native.so"
CUDA_LIBRARY = LIBRARY.with_name("_qsdp_cuda.so")
PYTHON = "python"
_CAPABILITIES = {"default": "scalar", "avx2": "avx2", "avx512": "avx512"}

_library: ctypes.CDLL | None = None
_has_cuda_kernels = False
_override: torch.library.Library | None = None  # while it lives, Python serves the CPU


def load() -> None:
    """Load the library if it is installed, and choose kernels.

    Raises:
        RuntimeError: the library is required but absent, or does not fit this torch.
        ValueError: QSDP_CPU_CAPABILITY names kernels that are unknown or cannot run here.
    """
    global _library, _has_cuda_kernels
    wanted = os.environ.get("QSDP_CPU_CAPABILITY", "")
    if wanted and wanted not in _CAPABILITIES:
        allowed = ", ".join(_CAPABILITIES)
        raise ValueError(f"QSDP_CPU_CAPABILITY is {wanted}; give one of {allowed}, or unset it")
    if LIBRARY.exists():
        _register(LIBRARY)
        _library = _typed(ctypes.CDLL(str(LIBRARY)))
    elif os.environ.get("QSDP_REQUIRE_NATIVE") == "1":
        raise RuntimeError(
            f"QSDP_REQUIRE_NATIVE=1 but {LIBRARY.name} is not installed; "
            "install qsdp where torch and a C++20 compiler are, or unset it"
        )
    if torch.version.cuda is not None and CUDA_LIBRARY.exists():
        _register(CUDA_LIBRARY)
        _has_cuda_kernels = True
    if wanted and _CAPABILITIES[wanted] not in available():
        raise ValueError(
            f"QSDP_CPU_CAPABILITY is {wanted}, which cannot run here; "
            f"the kernels that can are {', '.join(available())}"
        )
    if wanted:
        use(_CAPABILITIES[wanted])


def available() -> tuple[str, ...]:
    """The kernels that this machine can run, best first; the last is "python"."""
    if _library is None:
        return (PYTHON,)
    return (*_library.qsdp_cpu_available().decode().split(","), PYTHON)


def capability() -> str:
    """The kernels that serve the CPU: "avx512", "avx2", "scalar" or "python"."""
    if _library is None or _override is not None:
        return PYTHON
    return str(_library.qsdp_cpu_in_use().decode())


def cuda_capability() -> str:
    """The kernels that serve GPUs: "cuda" or "python"; "none" where there is no GPU."""
    if not torch.cuda.is_available():
        return "none"
    return "cuda" if _has_cuda_kernels else PYTHON


def use(capability: str) -> None:
    """Choose kernels, for tests and benchmarks; not while the codec runs in another thread.

    Raises:
        ValueError: ``capability`` is not one of `available`.
    """
    global _override
    if capability not in available():
        raise ValueError(
            f"no {capability} kernels can run here; give one of {', '.join(available())}"
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
        _override.impl("encode", ops.encode, "CPU")
        _override.impl("decode", ops.decode, "CPU")
        _override.impl("compact", sparse.compact, "CPU")
        _override.impl("expand", sparse.expand, "CPU")
        _override.impl("count_digits", magnitude.count_digits, "CPU")
        _override.impl("mark_above", magnitude.mark_above, "CPU")


def _register(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise RuntimeError(
            f"{library.name} does not load with torch {torch.__version__} ({error}); "
            "install qsdp again with this torch"
        ) from error


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    library.qsdp_cpu_available.restype = ctypes.c_char_p
    library.qsdp_cpu_in_use.restype = ctypes.c_char_p
    library.qsdp_cpu_use.argtypes = [ctypes.c_char_p]
    return library
