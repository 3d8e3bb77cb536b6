"""The emulated operations, and the device they pretend to run on."""

from __future__ import annotations

import emulation
import pytest
import torch


@pytest.fixture(scope="session")
def emulator():
    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler to build the emulated kernels with")
    return emulation.library()


@pytest.fixture
def emulated(emulator):
    """``torch.ops.grasp_sparse_emulated`` on a small device, so that small problems are cut into many blocks and chunks."""
    emulator.set_limits(4, 64 << 10)
    yield torch.ops.grasp_sparse_emulated
    emulator.set_limits(4, 64 << 10)
