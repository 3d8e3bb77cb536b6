"""Convolutions whose packed images are cut into bands: what a band keeps of the one before is what it would have packed itself."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from op_cases import IMAGE_LAYOUTS, close, dense_conv, dense_matrix, sparse_matrix

from grasp_sparse.ops.dtypes import compute_dtype

ops = torch.ops.grasp_sparse
CHANNELS, FILTERS, BATCH = 400, 5, 18  # a packed row of 10 pixels takes 256 KB: several bands to an image, two slices to a batch
WINDOWS = {  # kernel, stride, padding (top, bottom, left, right), dilation, image
    "3x3": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (31, 8)),
    "no padding": ((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), (31, 8)),
    "one-sided padding": ((4, 2), (1, 1), (0, 3, 1, 0), (1, 1), (23, 8)),
    "halo of more than a band": ((3, 1), (1, 1), (9, 9, 0, 0), (9, 1), (40, 8)),
    "stride 2": ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (41, 15)),
    "stride 2, rows only": ((5, 3), (2, 1), (2, 2, 1, 1), (1, 1), (41, 15)),
    "stride 3, dilated": ((3, 3), (3, 2), (2, 2, 2, 2), (2, 2), (50, 15)),
    "more padding than kernel": ((3, 3), (1, 1), (5, 5, 4, 4), (1, 1), (20, 6)),
}


# How bands lie: more than eight columns and few weights put their rows in a ring, else they are moved. Columns more, and filters.
BANDS = {"narrow": (0, FILTERS), "in a ring": (11, FILTERS), "wide, many weights": (4, 240)}


@lru_cache(maxsize=1)  # of all layouts, which follow one another
def _case(bands, window):
    """Weights and bias, x and g, and what the dense convolution of torch makes of them in float64."""
    torch.manual_seed(0)
    kernel, stride, padding, dilation, image = window
    more, filters = bands
    image = (image[0], image[1] + more * stride[1])
    dtype = torch.bfloat16 if stride == (2, 1) else torch.float32
    values, indices, mask = sparse_matrix(filters, CHANNELS * kernel[0] * kernel[1], 0.05, compute_dtype(dtype))
    weight = dense_matrix(values.double(), mask).view(filters, CHANNELS, *kernel).requires_grad_()
    bias = torch.randn(filters, dtype=compute_dtype(dtype))
    x = torch.randn(BATCH, CHANNELS, *image).to(dtype)
    exact = x.double().requires_grad_()
    y = dense_conv(exact, weight, bias.double(), stride, padding, dilation)
    g = torch.randn(y.shape).to(dtype)
    dx, dw = torch.autograd.grad(y, (exact, weight), g.double())
    return values, indices, bias, x, g, y.detach(), dx, dw.flatten(1)[mask].unsqueeze(0), g.double().sum((0, 2, 3))


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("bands", BANDS.values(), ids=BANDS)
def test_every_band_reads_what_it_should(bands, window, layout):
    values, indices, bias, x, g, y, *gradients = _case(bands, window)
    geometry, lay = window[:4], IMAGE_LAYOUTS[layout][0]
    image, x, g = x.shape[2:], lay(x), lay(g)
    dx, dv, _ = gradients
    close(ops.csr_conv2d_fprop(values, *indices, bias, x, *geometry), y, "fprop")
    close(ops.csr_conv2d_dgrad(values, *indices, g, image, *geometry), dx, "dgrad")
    close(ops.csr_conv2d_wgrad(*indices, g, x, *geometry), dv, "wgrad")
    for got, wanted in zip(ops.csr_conv2d_backward(values, *indices, g, x, *geometry), gradients, strict=True):
        close(got, wanted, "backward")
