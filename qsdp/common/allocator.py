"""Settings of glibc's allocator; another C library's is left as it is."""

from __future__ import annotations

import contextlib
import ctypes

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Keep what is freed for the next step, which takes it again.

    Where it would be given back, every step pays page faults anew for activations, gradients and
    copies of weights: steps of several passes pay most. So nothing large is mapped by itself, which
    freeing would unmap, and the heap never shrinks.
    """
    _set_mallopt(_MMAP_MAX, 0)
    _set_mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Return every freed tensor to the system.

    By default glibc learns to keep blocks of a tensor's size, and its heap, cut into pieces by
    small objects between them, grows with the number of tensors.
    """
    _set_mallopt(_MMAP_THRESHOLD, 1 << 16)


def _set_mallopt(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
