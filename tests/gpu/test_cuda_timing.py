"""Times on a device: recorded calls run, more work takes longer, and what cannot be recorded is timed all the same."""

from __future__ import annotations

import pytest
import torch

from grasp_sparse.cuda_timing import device_times, recorded

pytestmark = pytest.mark.gpu


def test_a_replay_does_the_work_again():
    x = torch.zeros(4, device="cuda")
    replay = recorded(lambda: x.add_(1))
    before = x[0].item()
    replay()
    torch.cuda.synchronize()
    assert x[0].item() == before + 1


def test_more_work_takes_longer():
    large, small = (torch.randn(2, n, n, device="cuda") for n in (4096, 1024))
    times = device_times({"large": lambda: large[0] @ large[1], "small": lambda: small[0] @ small[1]}, 5)
    assert times["large"].best > 4 * times["small"].best > 0  # other tests may be using the device


@pytest.mark.parametrize("ends_it", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()], ids=["seen early", "late"])
def test_it_records_after_one_that_failed(ends_it):
    """On the stream that was current, into memory that is not that of the failed one; random numbers and empty_cache go on too."""
    x, stream = torch.zeros(1 << 20, device="cuda"), torch.cuda.current_stream()
    for _ in range(2):
        assert recorded(lambda: ends_it(x + 1)) is None
        assert torch.cuda.current_stream() == stream
        assert torch.randn(8, device="cuda").isfinite().all()
        torch.cuda.empty_cache()
        replay = recorded(lambda: x.add_((x + 1) * 0 + 1))
        before = x[0].item()
        replay()
        torch.cuda.synchronize()
        assert x[0].item() == before + 1


def test_a_call_that_waits_for_the_device_is_timed_too():
    x = torch.randn(1 << 20, device="cuda")
    assert recorded(lambda: x.sum().item()) is None
    with pytest.warns(RuntimeWarning, match="waits: cannot be recorded"):
        assert device_times({"waits": lambda: x.sum().item()}, 3)["waits"].median > 0
