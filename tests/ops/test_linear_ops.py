"""The linear family equals its reference and plain matrix products, for every layout, batch and density."""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    BATCHES,
    COMPILED,
    DENSITIES,
    DTYPES,
    ROW_LAYOUTS,
    STORED,
    close,
    dense_matrix,
    same_layout_or_ambiguous,
    sparse_matrix,
)

from grasp_sparse.formats import csr_from_mask
from grasp_sparse.ops import reference
from grasp_sparse.ops.dtypes import compute_dtype

ops = torch.ops.grasp_sparse
SHAPES = {"7x5": (7, 5), "1x1": (1, 1), "1x19": (1, 19), "33x1": (33, 1), "40x67": (40, 67), "128x130": (128, 130)}


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_reference_and_matrix_product(dtype, shape, layout):
    lay, promised = ROW_LAYOUTS[layout]
    rows, cols = shape
    for density in DENSITIES:
        values, indices, mask = sparse_matrix(rows, cols, density)
        weight = dense_matrix(values, mask)
        bias = torch.randn(rows, dtype=torch.float64)
        for batch in (*BATCHES, 128):
            x, g = torch.randn(batch, cols, dtype=torch.float64), torch.randn(batch, rows, dtype=torch.float64)
            v, b, lx, lg = values.to(dtype), bias.to(dtype), lay(x.to(dtype)), lay(g.to(dtype))
            case = f"density {density}, batch {batch}"

            for given, wanted in ((b, bias), (None, torch.zeros(()))):
                y = ops.csr_spmm(v, *indices, given, lx)
                close(y, x @ weight.t() + wanted, f"csr_spmm, {case}")
                assert same_layout_or_ambiguous(lx, y, promised), case
            close(y, reference.csr_spmm(values, *indices, None, x), case)

            dx = ops.csr_spmm_t(v, *indices, lg)
            close(dx, g @ weight, f"csr_spmm_t, {case}")
            close(dx, reference.csr_spmm_t(values, *indices, g), case)
            assert same_layout_or_ambiguous(lg, dx, promised), case

            dv = ops.csr_sddmm(*indices, lg, lx)
            close(dv, (g.t() @ x)[mask].unsqueeze(0), f"csr_sddmm, {case}")
            close(dv, reference.csr_sddmm(*indices, g, x), case)
            assert dv.is_contiguous()

            joint = ops.csr_spmm_backward(v, *indices, lg, lx)
            for got, wanted in zip(joint, (g @ weight, (g.t() @ x)[mask].unsqueeze(0), g.sum(0)), strict=True):
                close(got, wanted, f"csr_spmm_backward, {case}")
            assert same_layout_or_ambiguous(lg, joint[0], promised), case


@pytest.mark.parametrize("y_layout", ROW_LAYOUTS)
@pytest.mark.parametrize("g_layout", ROW_LAYOUTS)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_relu(dtype, g_layout, y_layout):
    """Applied on the way out; on the way back g counts where it was open."""
    rows, cols = 37, 45
    values, indices, mask = sparse_matrix(rows, cols, 0.3, compute_dtype(dtype))
    weight, bias = dense_matrix(values.double(), mask), torch.randn(rows, dtype=compute_dtype(dtype))
    for batch in (1, 20, 130):
        x, g = torch.randn(batch, cols).to(dtype), torch.randn(batch, rows).to(dtype)
        y = ops.csr_spmm(values, *indices, bias, ROW_LAYOUTS[g_layout][0](x), True)
        close(y, (x.double() @ weight.t() + bias.double()).relu())
        assert (y == 0).any()
        gated = g.double() * (y > 0)
        wanted = gated @ weight, (gated.t() @ x.double())[mask].unsqueeze(0), gated.sum(0)
        arguments = values, *indices, ROW_LAYOUTS[g_layout][0](g), x, ROW_LAYOUTS[y_layout][0](y)
        for got, want in zip(ops.csr_spmm_backward(*arguments), wanted, strict=True):
            close(got, want)
        dx, *others = ops.csr_spmm_backward(*arguments, False)
        assert dx.numel() == 0
        for got, want in zip(others, wanted[1:], strict=True):
            close(got, want)


def test_relu_of_an_expanded_gradient_and_of_nan():
    values, indices, mask = sparse_matrix(9, 20, 0.5, torch.float32)
    x = torch.randn(24, 20)
    y = ops.csr_spmm(values, *indices, None, x, True)
    _, dvalues, dbias = ops.csr_spmm_backward(values, *indices, torch.ones(()).expand(24, 9), x, y)
    close(dvalues, ((y > 0).double().t() @ x.double())[mask].unsqueeze(0))
    close(dbias, (y > 0).sum(0))
    x[3] = torch.nan
    assert torch.equal(ops.csr_spmm(values, *indices, None, x, True)[3].isnan(), mask.any(1))


@pytest.mark.skipif(not COMPILED, reason="the reference computes in the wider type")
def test_y_of_another_shape_or_dtype_is_refused():
    values, indices, _ = sparse_matrix(9, 20, 0.5, torch.float32)
    x, g = torch.randn(24, 20), torch.randn(24, 9)
    for y in (g[:-1], g[:, :-1], g.double(), g[0]):
        with pytest.raises((RuntimeError, ValueError)):
            ops.csr_spmm_backward(values, *indices, g, x, y)


def test_arguments_of_different_layouts_and_odd_strides():
    values, indices, mask = sparse_matrix(12, 20, 0.3)
    weight = dense_matrix(values, mask)
    x, g = torch.randn(9, 20, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
    wide = torch.stack((values, values + 1), -1).flatten(1)[:, ::2]
    bias = torch.randn(24, dtype=torch.float64)[::2]
    close(ops.csr_spmm(wide, *indices, bias, x), x @ weight.t() + bias)
    close(ops.csr_sddmm(*indices, ROW_LAYOUTS["feature-major"][0](g), x), (g.t() @ x)[mask].unsqueeze(0))
    close(ops.csr_sddmm(*indices, g, ROW_LAYOUTS["feature-major"][0](x)), (g.t() @ x)[mask].unsqueeze(0))


def test_expanded_arguments():
    """What y.sum().backward() hands on: one number with all strides zero."""
    values, indices, mask = sparse_matrix(12, 20, 0.3)
    one = torch.ones((), dtype=torch.float64)
    x, g = one.expand(9, 20), one.expand(9, 12)
    flat = one.expand(1, indices.nnz)
    weight, places = dense_matrix(values, mask), mask.double()
    close(ops.csr_spmm(values, *indices, None, x), x @ weight.t())
    close(ops.csr_spmm_t(values, *indices, g), g @ weight)
    close(ops.csr_sddmm(*indices, g, x), (g.t() @ x)[mask].unsqueeze(0))
    close(ops.csr_spmm(flat, *indices, one.expand(12), x), x @ places.t() + 1)
    close(ops.csr_spmm_t(flat, *indices, g), g @ places)
    for got, wanted in zip(ops.csr_spmm_backward(flat, *indices, g, x), (g @ places, (g.t() @ x)[mask][None], g.sum(0)), strict=True):
        close(got, wanted)


def test_arguments_are_not_written_to():
    values, indices, _ = sparse_matrix(12, 20, 0.3, torch.float32)
    arguments = [values, *indices, torch.randn(12), torch.randn(9, 20), torch.randn(9, 12)]
    before = [a.clone() for a in arguments]
    bias, x, g = arguments[6:]
    ops.csr_spmm(values, *indices, bias, x)
    ops.csr_spmm_t(values, *indices, g)
    ops.csr_sddmm(*indices, g, x)
    ops.csr_spmm_backward(values, *indices, g, x)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("rows, cols, batch", [(0, 5, 4), (5, 0, 4), (5, 4, 0)])
def test_empty_results_have_the_strides_that_torch_gives_them(rows, cols, batch):
    indices = csr_from_mask(torch.zeros(rows, cols, dtype=torch.bool))
    values, x, g = torch.empty(1, 0), torch.randn(batch, cols), torch.randn(batch, rows)
    for result in (
        ops.csr_spmm(values, *indices, None, x), ops.csr_spmm_t(values, *indices, g), ops.csr_sddmm(*indices, g, x),
        *ops.csr_spmm_backward(values, *indices, g, x),
    ):  # fmt: skip
        assert result.stride() == torch.empty(result.shape).stride()
