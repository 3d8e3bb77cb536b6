"""The emulator sees what a GPU would leave undefined; without that, the tests of kernels on it would prove little."""

from __future__ import annotations

import ctypes

import pytest
import torch

FAULTS = {
    "a thread returns before a barrier": "has returned",
    "lanes meet at different barriers": "diverge at a barrier",
    "a write past the end of shared memory": "past the end of shared memory",
    "half a warp": "Expected whole warps",
}


@pytest.mark.parametrize("which, message", list(enumerate(FAULTS.values())), ids=list(FAULTS))
def test_a_fault_is_an_error(emulator, which, message):
    emulator.launch_faulty.restype = ctypes.c_char_p
    assert message in emulator.launch_faulty(which).decode()


def test_a_copy_arrives_when_it_is_waited_for(emulator):
    source, result = torch.arange(32, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    emulator.read_early(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(result.data_ptr()))
    assert (result[:32] == -1).all()
    assert torch.equal(result[32:], source)


def test_a_barrier_that_is_missing_shows_in_one_of_two_blocks(emulator):
    """Threads that run one after the other would find what those before them wrote, with a barrier or without."""
    found = torch.zeros(2, 64, dtype=torch.int32)
    emulator.read_others(ctypes.c_void_p(found.data_ptr()))
    before = torch.arange(64, dtype=torch.int32).roll(1)
    right = (found == before).sum(1).tolist()
    assert sorted(right) == [1, 63] and (found[found != before.expand(2, -1)] == -1).all()
