"""The operations on whole blocks equal their float64 reference for every block size, window, layout, batch and density.

What values hold where a block reaches past the weight is NaN here, and counts for nothing.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    BLOCK_SIZES,
    COMPILED,
    DTYPES,
    IMAGE_LAYOUTS,
    ROW_LAYOUTS,
    STORED,
    WINDOWS,
    block_matrix,
    close,
    same_layout_or_ambiguous,
)
from torch import Tensor

from grasp_sparse.formats import gather_blocks
from grasp_sparse.ops import reference_blocks as reference
from grasp_sparse.ops.dtypes import compute_dtype

ops = torch.ops.grasp_sparse


def check_values_gradient(actual: Tensor, expected: Tensor, weight_shape, indices, what: str) -> None:
    """Equal, contiguous, and exactly zero past the weight."""
    close(actual, expected, what)
    assert actual.is_contiguous() and actual.shape == expected.shape
    outside = gather_blocks(torch.ones(weight_shape), indices, actual.shape[1:]) == 0
    assert (actual[outside] == 0).all(), what


def check_linear(dtype, shape, block_size, density, batch, lay, promised) -> None:
    values, indices = block_matrix(shape, block_size, density, past=torch.nan)
    bias = torch.randn(shape[0], dtype=torch.float64)
    x, g = (torch.randn(batch, size).to(dtype) for size in (shape[1], shape[0]))
    v, b, lx, lg = values.to(compute_dtype(dtype)), bias.to(compute_dtype(dtype)), lay(x), lay(g)
    case = f"density {density}, batch {batch}"
    for given, relu in ((b, False), (None, False), (b, True)):
        y = ops.bsr_spmm(v, *indices, given, lx, shape[0], relu)
        exact = None if given is None else bias
        close(y, reference.bsr_spmm(values, *indices, exact, x.double(), shape[0], relu), f"bsr_spmm, {case}")
        assert same_layout_or_ambiguous(lx, y, promised), case
    dx = ops.bsr_spmm_t(v, *indices, lg, shape[1])
    close(dx, reference.bsr_spmm_t(values, *indices, g.double(), shape[1]), f"bsr_spmm_t, {case}")
    assert same_layout_or_ambiguous(lg, dx, promised), case
    dv = ops.bsr_sddmm(*indices, lg, lx, block_size)
    expected = reference.bsr_sddmm(*indices, g.double(), x.double(), block_size)
    check_values_gradient(dv, expected, shape, indices, f"bsr_sddmm, {case}")


SHAPES = {"7x5": (7, 5), "1x19": (1, 19), "33x1": (33, 1), "40x67": (40, 67), "70x96": (70, 96)}


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_of_every_block_size(dtype, shape, block_size):
    for density in (0.0, 0.3, 1.0):
        for batch in (0, 3, 33, 300):
            check_linear(dtype, shape, block_size, density, batch, *ROW_LAYOUTS["row-major"])


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_linear_in_every_layout(dtype, layout):
    for shape, block_size in (((40, 67), (8, 8)), ((35, 20), (4, 16)), ((64, 48), (16, 16))):
        for batch in (1, 17, 128):
            check_linear(dtype, shape, block_size, 0.3, batch, *ROW_LAYOUTS[layout])


def check_conv(dtype, filters, channels, block_size, window, density, batch, layout) -> None:
    lay, promised = IMAGE_LAYOUTS[layout]
    *geometry, image = window
    shape, case = (filters, channels, *geometry[0]), f"{block_size}, density {density}, batch {batch}"
    values, indices = block_matrix(shape, block_size, density, past=torch.nan)
    bias, x = torch.randn(filters, dtype=torch.float64), torch.randn(batch, channels, *image).to(dtype)
    v, b, lx = values.to(compute_dtype(dtype)), bias.to(compute_dtype(dtype)), lay(x)
    for given, relu in ((b, False), (None, True)):
        y = ops.bsr_conv2d_fprop(v, *indices, given, lx, filters, *geometry, relu)
        exact = bias if given is not None else None
        close(y, reference.bsr_conv2d_fprop(values, *indices, exact, x.double(), filters, *geometry, relu), f"fprop, {case}")
        assert same_layout_or_ambiguous(lx, y, promised), case
    g = torch.randn(y.shape).to(dtype)
    lg = lay(g)
    dx = ops.bsr_conv2d_dgrad(v, *indices, lg, channels, image, *geometry)
    close(dx, reference.bsr_conv2d_dgrad(values, *indices, g.double(), channels, image, *geometry), f"dgrad, {case}")
    assert same_layout_or_ambiguous(lg, dx, promised), case
    dv = ops.bsr_conv2d_wgrad(*indices, lg, lx, block_size, *geometry)
    expected = reference.bsr_conv2d_wgrad(*indices, g.double(), x.double(), block_size, *geometry)
    check_values_gradient(dv, expected, shape, indices, f"wgrad, {case}")


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_conv_of_every_window_in_every_layout(dtype, window, layout):
    for block_size, batch in (((4, 4), 3), ((3, 2), 17)):
        check_conv(dtype, 10, 6, block_size, window, 0.4, batch, layout)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_conv_of_every_block_size(dtype, block_size, layout):
    for window in ("3x3", "3x3-stride2", "1x1-whole-vectors"):
        for density, batch in ((0.0, 2), (0.2, 33), (1.0, 5), (1.0, 0)):
            check_conv(dtype, 37, 21, block_size, WINDOWS[window], density, batch, layout)


def test_expanded_arguments_and_odd_strides():
    """What y.sum().backward() hands on, one number with all strides zero; values and bias whose entries lie apart."""
    values, indices = block_matrix((12, 20), (4, 3), 0.5)
    one = torch.ones((), dtype=torch.float64)
    x, g = torch.randn(9, 20, dtype=torch.float64), one.expand(9, 12)
    apart, bias = torch.stack((values, values + 1), -1)[..., 0], torch.randn(24, dtype=torch.float64)[::2]
    for v in (apart, values.transpose(1, 2).contiguous().transpose(1, 2), one.expand(values.shape)):
        assert not v.is_contiguous()
        close(ops.bsr_spmm(v, *indices, bias, x, 12), reference.bsr_spmm(v, *indices, bias, x, 12))
        close(ops.bsr_spmm_t(v, *indices, g, 20), reference.bsr_spmm_t(v, *indices, g, 20))
    close(ops.bsr_sddmm(*indices, g, x, (4, 3)), reference.bsr_sddmm(*indices, g, x, (4, 3)))


@pytest.mark.skipif(not COMPILED, reason="the reference multiplies by the zeros of a dense weight")
@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_what_is_not_finite_reaches_only_what_reads_it(number):
    """Outputs whose blocks have the input; gradients of blocks that touch it."""
    values, indices = block_matrix((12, 22), (4, 4), 0.4, torch.float32)
    x, g = torch.randn(20, 22), torch.randn(20, 12)
    kept = reference.scatter_blocks(torch.ones_like(values), indices, (12, 22)).bool()
    for feature in (0, 9, 21):
        bad = x.clone()
        bad[3, feature] = number
        touched = torch.zeros(20, 12, dtype=torch.bool)
        touched[3] = kept[:, feature]
        assert torch.equal(~ops.bsr_spmm(values, *indices, None, bad, 12).isfinite(), touched)
        touched = gather_blocks(torch.arange(22).expand(12, 22) + 1, indices, (4, 4)) == feature + 1
        assert torch.equal(~ops.bsr_sddmm(*indices, g, bad, (4, 4)).isfinite(), touched)
