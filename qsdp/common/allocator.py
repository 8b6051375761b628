"""Settings of the memory allocators."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next step, which takes it again.

    Where it would be given back, every step pays page faults anew for activations, gradients and
    copies of weights: steps of several passes pay most. So nothing large is mapped by itself, which
    freeing would unmap, and the heap never shrinks. Does nothing where there is no mallopt.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, (1 << 31) - 1)
