"""1x1 convolutions take pixels for lanes, in NCHW and channels_last: any number of pixels, memory that begins and strides anyhow."""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, STORED, close, dense_matrix, sparse_matrix
from torch import Tensor

from grasp_sparse.ops.dtypes import compute_dtype

ops = torch.ops.grasp_sparse
WINDOW = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1])
IMAGES = {  # float32: 16 pixels a vector
    "too few for pixel lanes": (5, 6),
    "three vectors, one over": (7, 7),
    "four vectors, no rest": (8, 8),
    "a row of vectors and a rest": (14, 14),
    "17 vectors": (16, 17),
    "seven rows of seven": (28, 28),
    "channels 4 KiB apart": (32, 32),
    "rest of everything": (23, 29),
}
CHANNELS, FILTERS = 20, 9


def _channel_slice(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), torch.nan, dtype=t.dtype)
    wide[:, 2:-1] = t
    return wide[:, 2:-1]


def _misaligned(t: Tensor) -> Tensor:
    flat = torch.full((t.numel() + 3,), torch.nan, dtype=t.dtype)
    flat[3:] = t.flatten()
    return flat[3:].view(t.shape)


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _last_and_cut(t: Tensor) -> Tensor:
    """Pixels of all images at equal distances that are not the number of channels."""
    wide = _last(torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), torch.nan, dtype=t.dtype))
    wide[:, 2:-1] = t
    return wide[:, 2:-1]


def _last_and_framed(t: Tensor) -> Tensor:
    """The inner part of larger images: their rows do not follow one another."""
    n, c, h, w = t.shape
    framed = _last(torch.full((n, c, h + 2, w + 1), torch.nan, dtype=t.dtype))
    framed[:, :, 1:-1, 1:] = t
    return framed[:, :, 1:-1, 1:]


PLACES = {
    "contiguous": (Tensor.contiguous, Tensor.contiguous),
    "slices of channels": (_channel_slice, _channel_slice),
    "x misaligned": (_misaligned, Tensor.contiguous),
    "g misaligned": (Tensor.contiguous, _misaligned),
    "g channels_last": (Tensor.contiguous, _last),
    "channels_last": (_last, _last),
    "channels_last, slices of channels": (_last_and_cut, _last_and_cut),
    "channels_last, x the inner part": (_last_and_framed, _last),
    "channels_last, g the inner part": (_last, _last_and_framed),
    "channels_last, one g for all": (_last, lambda g: g[:1, :, :1, :1].expand(g.shape)),
}


def _arguments(image: tuple[int, int], batch: int, dtype: torch.dtype):
    values, indices, mask = sparse_matrix(FILTERS, CHANNELS, 0.3, compute_dtype(dtype))
    bias = torch.randn(FILTERS, dtype=compute_dtype(dtype))
    x, g = torch.randn(batch, CHANNELS, *image).to(dtype), torch.randn(batch, FILTERS, *image).to(dtype)
    return values, indices, mask, bias, x, g


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_equals_dense_formula(dtype, image, place):
    for batch in (1, 5, 18):
        values, indices, mask, bias, x, g = _arguments(image, batch, dtype)
        weight, x64 = dense_matrix(values.double(), mask), x.double()
        x, g = place[0](x), place[1](g)
        g64 = g.double()
        y = torch.einsum("oi,nihw->nohw", weight, x64) + bias.double()[:, None, None]
        dx = torch.einsum("oi,nohw->nihw", weight, g64)
        dvalues = torch.einsum("nohw,nihw->oi", g64, x64)[mask].unsqueeze(0)
        close(ops.csr_conv2d_fprop(values, *indices, bias, x, *WINDOW), y, "fprop")
        close(ops.csr_conv2d_dgrad(values, *indices, g, list(image), *WINDOW), dx, "dgrad")
        close(ops.csr_conv2d_wgrad(*indices, g, x, *WINDOW), dvalues, "wgrad")
        found = ops.csr_conv2d_backward(values, *indices, g, x, *WINDOW)
        for got, wanted in zip(found, (dx, dvalues, g64.sum((0, 2, 3))), strict=True):
            close(got, wanted, "backward")


@pytest.mark.parametrize("lay", [Tensor.contiguous, _last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_pixels_do_not_meet(image, lay):
    """A NaN in one pixel is in that pixel of the result, and in no other."""
    values, indices, mask, bias, x, g = _arguments(image, 2, torch.float32)
    x, g = lay(x), lay(g)
    x[1, :, 3, 4] = g[1, :, 3, 4] = torch.nan
    for result, used in (
        (ops.csr_conv2d_fprop(values, *indices, bias, x, *WINDOW), mask.any(1)),
        (ops.csr_conv2d_dgrad(values, *indices, g, list(image), *WINDOW), mask.any(0)),
    ):
        assert torch.equal(result[1, :, 3, 4].isnan(), used)
        result[1, :, 3, 4] = 0
        assert result.isfinite().all()


@pytest.mark.parametrize("lay", [Tensor.contiguous, _last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_same_bits_for_any_number_of_threads(image, lay):
    values, indices, _, _, x, g = _arguments(image, 5, torch.float32)
    x, g = lay(x), lay(g)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.csr_conv2d_backward(values, *indices, g, x, *WINDOW))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.skipif(not COMPILED, reason="the reference reads indices through torch's own checks")
@pytest.mark.parametrize("wrong", [-1, CHANNELS, 2**30])
@pytest.mark.parametrize("image", [(7, 7), (28, 28)], ids=["packed", "in place"])
def test_corrupt_column_is_refused(image, wrong):
    values, indices, _, bias, x, g = _arguments(image, 2, torch.float32)
    col = indices.col_indices.clone()
    col[3] = wrong
    indices = indices._replace(col_indices=col)
    for call in (
        lambda: ops.csr_conv2d_fprop(values, *indices, bias, x, *WINDOW),
        lambda: ops.csr_conv2d_wgrad(*indices, g, x, *WINDOW),
        lambda: ops.csr_conv2d_backward(values, *indices, g, x, *WINDOW),
    ):
        with pytest.raises(RuntimeError, match="corrupt"):
            call()
