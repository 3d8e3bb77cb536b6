"""Tests on a device run in several processes at once: none keeps memory that another may want."""

from __future__ import annotations

import gc

import pytest
import torch

KEPT = 1 << 30


@pytest.fixture(autouse=True)
def memory_is_given_back():
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        gc.collect()
        torch.cuda.empty_cache()
