"""Shared by every test: a fixed seed, and new CPU memory that is poisoned, so that a result nobody wrote is seen."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

# c10's own debugging flag: fills every new CPU tensor, also those that compiled kernels allocate, with a pattern that is NaN
# in float32 and 1.7e308 in float64. torch.utils.deterministic.fill_uninitialized_memory would reach torch.empty only.
_C10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
_POISON = ctypes.c_bool.in_dll(_C10, "FLAGS_caffe2_cpu_allocator_do_junk_fill")


@pytest.fixture(autouse=True)
def poisoned_memory():
    _POISON.value = True
    yield
    _POISON.value = False


@pytest.fixture(autouse=True)
def seed_and_threads():
    torch.manual_seed(0)
    # Tests are small: two threads that wait for each other take longer. Those that are about threads ask for them.
    torch.set_num_threads(1)
