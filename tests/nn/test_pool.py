"""Pooling layers are torch's: same results and gradients wherever the kernels run, torch's own elsewhere; the layout stays."""

from __future__ import annotations

import pytest
import torch
from op_cases import IMAGE_LAYOUTS, is_chwn
from torch import nn

from grasp_sparse.nn import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

KINDS = {
    "2": dict(kernel_size=2),
    "3/2": dict(kernel_size=3, stride=2, padding=1),
    "3/2 ceil": dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), ceil_mode=True),
    "large": dict(kernel_size=17, stride=4, padding=8),  # more places than a byte tells apart
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_torch(dtype, kind, memory_format):
    ours, stock = MaxPool2d(**KINDS[kind]), nn.MaxPool2d(**KINDS[kind])
    x = torch.randn(3, 4, 18, 20).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    y, expected = ours(x), stock(x)
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=memory_format)
    g = torch.randn(y.shape).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6  # torch adds up in bfloat16
    torch.testing.assert_close(
        torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("shape", [(4, 9, 9), (2, 3, 9, 9), (0, 3, 9, 9)], ids=str)
def test_what_torch_takes(shape):
    x = torch.randn(shape)
    assert torch.equal(MaxPool2d(3, 2)(x), nn.MaxPool2d(3, 2)(x))


def test_indices_are_torchs():
    x = torch.randn(2, 3, 8, 8)
    assert all(map(torch.equal, MaxPool2d(2, return_indices=True)(x), nn.MaxPool2d(2, return_indices=True)(x)))


def test_a_window_that_does_not_fit_is_refused_as_torch_does():
    for layer in (MaxPool2d(2, padding=2), nn.MaxPool2d(2, padding=2)):
        with pytest.raises(RuntimeError, match="half of effective kernel size|half of kernel size"):
            layer(torch.randn(1, 1, 8, 8))


def test_under_compile():
    layer, x = MaxPool2d(3, 2, 1), torch.randn(2, 3, 9, 9)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), nn.MaxPool2d(3, 2, 1)(x))


AVERAGES = {
    "2": (AvgPool2d, nn.AvgPool2d, dict(kernel_size=2)),
    "3/2 ceil": (AvgPool2d, nn.AvgPool2d, dict(kernel_size=(3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False)),
    "to 3x4": (AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, dict(output_size=(3, 4))),
    "to one": (AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, dict(output_size=1)),
}


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN", "sliced"])
@pytest.mark.parametrize("ours, stock, options", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_equal_torchs_and_keep_the_batch_innermost(dtype, ours, stock, options, layout):
    x = IMAGE_LAYOUTS[layout][0](torch.randn(3, 4, 9, 10).to(dtype)).detach().requires_grad_()
    y, expected = ours(**options)(x), stock(**options)(x)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert is_chwn(y) if layout == "CHWN" else y.stride() == expected.stride()
    g = torch.randn(y.shape).to(dtype)
    got, want = (torch.autograd.grad(out, x, g)[0] for out in (y, expected))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    if layout == "CHWN" and y.shape[2:] != (1, 1):
        assert is_chwn(got)
    assert ours(**options)(x[0]).shape == stock(**options)(x[0]).shape
