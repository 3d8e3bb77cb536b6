"""Max pooling equals torch's in every layout and window, which of several largest values gets the gradient included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import IMAGE_LAYOUTS, STORED, close, same_layout_or_ambiguous
from pool_cases import CASES, WINDOWS, picture

from grasp_sparse.ops import reference_pool

ops = torch.ops.grasp_sparse


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("window, shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_equals_torch(dtype, window, shape, layout):
    window = WINDOWS[window]
    x = picture(shape, layout, dtype)
    exact = x.detach().double().contiguous().requires_grad_()
    y, places = ops.max_pool2d(x, *window)
    expected = F.max_pool2d(exact, *window)
    assert torch.equal(y.double(), expected) and same_layout_or_ambiguous(x, y, IMAGE_LAYOUTS[layout][1])
    g = torch.randn(expected.shape).to(dtype)
    (got,), (want,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, exact, g.double())
    close(got, want)
    referred, referred_places = reference_pool.max_pool2d(x.detach(), *window)
    assert torch.equal(referred, y) and torch.equal(referred_places, places)
    close(reference_pool.max_pool2d_backward(g, places, x.shape[2:], *window), want)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
def test_nan_and_infinity(layout):
    x = picture((3, 5, 9, 9), layout, torch.float32).detach()
    x[0, 0, 2, 2] = x[1, 3, 4, 5] = x[1, 3, 4, 6] = float("nan")
    x[2] = -torch.inf
    x.requires_grad_()
    for window in WINDOWS.values():
        y, _ = ops.max_pool2d(x, *window)
        expected = F.max_pool2d(x, *window)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
        g = torch.randn_like(y)
        torch.testing.assert_close(*(torch.autograd.grad(result, x, g)[0] for result in (y, expected)))


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
def test_bits_do_not_depend_on_threads(layout):
    x, results = picture((9, 40, 15, 15), layout, torch.float32), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, places = ops.max_pool2d(x, *WINDOWS["3x3/2"])
        results.append((y, places, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_window_in_the_padding_alone_gives_no_gradient():
    """torch reads out of bounds there."""
    x = torch.zeros(2, 3, 1, 1, requires_grad=True)
    y, places = ops.max_pool2d(x, (2, 2), (1, 1), (2, 2), (3, 3), False)
    inside = places != reference_pool.NO_PLACE
    assert torch.equal(y, reference_pool.max_pool2d(x, (2, 2), (1, 1), (2, 2), (3, 3), False)[0]) and not bool(inside.all())
    assert torch.equal(y.isneginf(), ~inside)
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0].flatten(), inside.sum((2, 3)).flatten().float())


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
@pytest.mark.parametrize("window", ["3x3/2-ceil", "3x2/13-dilation21-ceil"])
def test_gradcheck(window, layout):
    # All values differ by more than the step of the finite differences: the largest one stays the largest.
    x = torch.randperm(2 * 3 * 7 * 8).view(2, 3, 7, 8).double()
    x = IMAGE_LAYOUTS[layout][0](x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.max_pool2d(x, *WINDOWS[window])[0], x)
    assert torch.autograd.gradgradcheck(lambda x: ops.max_pool2d(x, *WINDOWS[window])[0], x)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN", "sliced"])
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_opcheck(dtype, layout):
    window = WINDOWS["3x3/2-ceil"]
    x = picture((2, 5, 7, 8), layout, dtype)
    torch.library.opcheck(ops.max_pool2d.default, (x, *window))
    y, places = ops.max_pool2d(x.detach(), *window)
    torch.library.opcheck(ops.max_pool2d_backward.default, (torch.randn_like(y), places, [7, 8], *window))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (((2, 2), (2, 2), (2, 0), (1, 1), False), "at most half the window"),
        (((2, 2), (0, 2), (0, 0), (1, 1), False), "positive sizes"),
        (((16, 16), (1, 1), (0, 0), (1, 1), False), "at most 255 places"),
        (((9, 2), (2, 2), (0, 0), (1, 1), False), "too small"),
        (((2,), (2, 2), (0, 0), (1, 1), False), "two numbers"),
    ],
)
def test_errors(arguments, said):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grasp_sparse::max_pool2d", "CPU"):
        pytest.skip("the reference trusts its caller")
    with pytest.raises(RuntimeError, match=said):
        ops.max_pool2d(torch.zeros(1, 1, 8, 8), *arguments)
