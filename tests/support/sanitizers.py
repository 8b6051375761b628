"""What a Python process needs that loads a library which g++ has built under sanitizers."""

from __future__ import annotations

import subprocess


def runtimes() -> str:
    """The runtimes of AddressSanitizer and UBSan, as LD_PRELOAD takes them."""
    return " ".join(
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
