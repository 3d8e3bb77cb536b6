"""New memory filled with NaN while a kernel is checked, so that a result nobody wrote is seen."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, every new CPU tensor, also those that compiled kernels allocate, holds NaN (float64: 1.7e308) until written.

    This is c10's own debugging flag; torch.utils.deterministic.fill_uninitialized_memory reaches torch.empty only.
    """
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    flag = ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    before, flag.value = flag.value, True
    try:
        yield
    finally:
        flag.value = before
