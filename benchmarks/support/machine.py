"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import torch

from qsdp.ops import native


def device() -> str:
    """Where launch/train_gpt.py trains here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str = "cpu") -> dict[str, str]:
    """Processor, cores, versions and date, to stand beside every figure."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "kernels": native.serving(torch.device(device)),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
    }


def one_line(described: dict[str, str]) -> str:
    """The same for a reader."""
    where = f"{described['processor']}, {described['cores']} cores ({described['kernels']})"
    if described["device"] != "cpu":
        where += f", {described['device']}"
    return f"measured on {where}, torch {described['torch']}, {described['date']}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
