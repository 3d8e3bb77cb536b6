"""Tests on a device run in several processes at once: none keeps memory that another may want. One that breaks the device for its
process ends that process, for all that follow would fail."""

from __future__ import annotations

import gc

import pytest
import torch

KEPT = 1 << 30


@pytest.fixture(autouse=True)
def memory_is_given_back(request):
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()  # what a kernel has done to the device shows here, in its own test
        except RuntimeError as error:
            pytest.exit(f"the device answers no more after {request.node.nodeid}: {error}", returncode=pytest.ExitCode.INTERRUPTED)
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        gc.collect()
        torch.cuda.empty_cache()
