"""What becomes of memory that tensors no longer need: by default glibc gives large blocks back to the kernel.

The next step then gets each of them anew, page by page, all zeroed; a sparse layer, which computes less, can spend most of its time so.
"""

from __future__ import annotations

import ctypes
import os

VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
# Numbers of mallopt(3) in malloc.h, and what those variables set: no block of its own mapping, the heap is never made
# smaller (-1), and grows by 256 MiB at a time.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 1 << 28)}
_kept = False


def keep_memory() -> bool:
    """From now on memory that this process has used stays with it, for the next step; it never becomes smaller.

    For training on a CPU under glibc, best before layers are measured. Settings from outside (``MALLOC_MMAP_MAX_``,
    ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_TOP_PAD_``, or another allocator in ``LD_PRELOAD``) stand.

    Returns:
        Whether it has been set here: not where there are such settings, or another C library.
    """
    global _kept
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    _kept = all([mallopt(number, value) == 1 for number, value in _SETTINGS.values()])
    return _kept


def allocator() -> str:
    """The settings of this process in words: they change dense and sparse steps alike."""
    if _kept:
        return "memory kept"
    tuned = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return " ".join(tuned) if tuned else "system default"
