"""The poison works: without it the tests of unwritten output would prove nothing."""

import torch


def test_new_memory_is_poisoned():
    for size in (3, 1000, 1_000_000):
        assert torch.empty(size).isnan().all()
        assert (torch.empty(size, dtype=torch.float64) > 1e300).all()
        assert torch.ops.aten.empty_strided([size], [1]).isnan().all()
