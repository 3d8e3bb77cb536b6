"""The passes with a dense weight, and the operations on whole blocks, equal formulas that share no code with them."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    BATCHES,
    DENSITIES,
    IMAGE_LAYOUTS,
    ROW_LAYOUTS,
    STORED,
    WINDOWS,
    block_matrix,
    close,
    dense_conv,
    same_layout_or_ambiguous,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from grasp_sparse.formats import CsrIndices
from grasp_sparse.ops import bsr_conv2d, bsr_linear, dense, functional

ops = torch.ops.grasp_sparse
SIZES = {"whole": ((8, 12), (4, 3)), "ragged": ((7, 11), (4, 3)), "larger": ((3, 5), (8, 8)), "single": ((4, 5), (1, 1))}


def weight_of_blocks(values: torch.Tensor, indices: CsrIndices, weight_shape) -> torch.Tensor:
    """The dense weight, block by block as the format is written down; differentiable."""
    out, channels, *kernel = weight_shape
    bh, bw = values.shape[1:]
    chunks = math.ceil(channels / bw)
    weight = values.new_zeros(out, channels, math.prod(kernel)) + 0 * values.sum()  # of the values even if there are none
    for row in range(math.ceil(out / bh)):
        for entry in range(int(indices.crow_indices[row]), int(indices.crow_indices[row + 1])):
            tap, chunk = divmod(int(indices.col_indices[entry]), chunks)
            height, width = min(bh, out - row * bh), min(bw, channels - chunk * bw)
            weight[row * bh : row * bh + height, chunk * bw : chunk * bw + width, tap] = values[entry, :height, :width]
    return weight.view(tuple(weight_shape))


def gated(y: torch.Tensor, relu: bool) -> torch.Tensor:
    return y.relu() if relu else y


class TestDense:
    @pytest.mark.parametrize("layout", ROW_LAYOUTS)
    @pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
    def test_linear(self, dtype, layout):
        lay, promised = ROW_LAYOUTS[layout]
        compute = torch.float32 if dtype == torch.bfloat16 else dtype
        weight, bias = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        for batch in BATCHES:
            x, g = lay(torch.randn(batch, 7).to(dtype)), lay(torch.randn(batch, 5).to(dtype))
            exact = x.double() @ weight.t()
            for relu in (False, True):
                y = dense.linear(weight.to(compute), bias.to(compute), x, relu)
                close(y, gated(exact + bias, relu).to(dtype), f"batch {batch}")
                assert y.dtype == dtype and same_layout_or_ambiguous(x, y, promised)
            close(dense.linear(weight.to(compute), None, x), exact.to(dtype))
            dx = dense.linear_t(weight.to(compute), g)
            close(dx, (g.double() @ weight).to(dtype))
            assert dx.dtype == dtype and same_layout_or_ambiguous(g, dx, promised)

    @pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
    @pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
    def test_convolution(self, window, layout):
        lay, promised = IMAGE_LAYOUTS[layout]
        kernel, stride, padding, dilation, image = window
        weight = torch.randn(5, 3, *kernel, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(5, dtype=torch.float64)
        for batch in (0, 3):
            x = lay(torch.randn(batch, 3, *image, dtype=torch.float64)).requires_grad_()
            expected = dense_conv(x, weight, bias, stride, padding, dilation)
            g = lay(torch.randn_like(expected).contiguous())
            dx, dw = torch.autograd.grad(expected, (x, weight), g)
            with torch.no_grad():
                for relu in (False, True):
                    y = dense.fprop(weight, bias, x, stride, padding, dilation, relu)
                    close(y, gated(expected, relu))
                    assert same_layout_or_ambiguous(x, y, promised)
                got = dense.dgrad(weight, g, image, stride, padding, dilation)
                close(got, dx)
                assert same_layout_or_ambiguous(g, got, promised)
                close(dense.wgrad(g, x, kernel, stride, padding, dilation), dw)

    @pytest.mark.parametrize("out, channels", [(0, 3), (4, 0)])
    def test_convolutions_without_channels(self, out, channels):
        weight, bias, x = torch.randn(out, channels, 3, 3), torch.randn(out), torch.randn(2, channels, 5, 6)
        window = ((1, 1), (0, 0, 0, 0), (1, 1))
        y = dense.fprop(weight, bias, x, *window)
        assert torch.equal(y, bias[:, None, None].expand(2, out, 3, 4))
        assert torch.equal(dense.dgrad(weight, y, (5, 6), *window), torch.zeros(2, channels, 5, 6))
        assert torch.equal(dense.wgrad(y, x, (3, 3), *window), torch.zeros(out, channels, 3, 3))


class TestBlocks:
    @pytest.mark.parametrize("density", DENSITIES)
    @pytest.mark.parametrize("shape, block", SIZES.values(), ids=SIZES)
    @pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
    def test_linear(self, dtype, shape, block, density):
        exact_values, indices = block_matrix(shape, block, density)
        exact_values.requires_grad_()
        weight = weight_of_blocks(exact_values, indices, shape)
        compute = torch.float32 if dtype == torch.bfloat16 else dtype
        values, bias = exact_values.detach().to(compute), torch.randn(shape[0], dtype=torch.float64)
        for batch in BATCHES:
            x, g = torch.randn(batch, shape[1]).to(dtype), torch.randn(batch, shape[0]).to(dtype)
            exact = x.double() @ weight.t() + bias
            for relu in (False, True):
                y = ops.bsr_spmm(values, *indices, bias.to(compute), x, shape[0], relu)
                close(y, gated(exact, relu).detach().to(dtype), f"batch {batch}")
            close(ops.bsr_spmm_t(values, *indices, g, shape[1]), (g.double() @ weight).detach().to(dtype))
            (expected,) = torch.autograd.grad(exact, exact_values, g.double(), retain_graph=True)
            dv = ops.bsr_sddmm(*indices, g, x, block)
            close(dv, expected.to(compute))
            assert dv.dtype == compute and bool((dv[weight_past_the_edge(indices, shape, block)] == 0).all())

    @pytest.mark.parametrize("block", [(2, 2), (4, 3), (1, 5), (16, 16)], ids=str)
    @pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
    def test_convolution(self, window, block):
        kernel, stride, padding, dilation, image = window
        shape = (6, 5, *kernel)
        values, indices = block_matrix(shape, block, 0.5)
        values.requires_grad_()
        weight, bias = weight_of_blocks(values, indices, shape), torch.randn(6, dtype=torch.float64)
        for batch in (0, 3):
            x = torch.randn(batch, 5, *image, dtype=torch.float64, requires_grad=True)
            expected = dense_conv(x, weight, bias, stride, padding, dilation)
            g = torch.randn_like(expected)
            dx, dv = torch.autograd.grad(expected, (x, values), g, retain_graph=True)
            for relu in (False, True):
                y = ops.bsr_conv2d_fprop(values, *indices, bias, x, 6, kernel, stride, padding, dilation, relu)
                close(y, gated(expected, relu))
            close(ops.bsr_conv2d_dgrad(values, *indices, g, 5, image, kernel, stride, padding, dilation), dx)
            got = ops.bsr_conv2d_wgrad(*indices, g, x, block, kernel, stride, padding, dilation)
            close(got, dv)
            assert bool((got[weight_past_the_edge(indices, shape, block)] == 0).all())


def weight_past_the_edge(indices: CsrIndices, shape, block) -> torch.Tensor:
    """Of the stored values those that belong to no weight, as a bool tensor."""
    values = torch.ones(indices.nnz, *block, dtype=torch.float64, requires_grad=True)
    (inside,) = torch.autograd.grad(weight_of_blocks(values, indices, shape).sum(), values)
    return inside == 0


class TestTypedEntry:
    def test_linear_takes_any_rank_and_a_relu(self):
        values, indices = block_matrix((5, 8), (2, 3), 0.6)
        weight, bias = weight_of_blocks(values, indices, (5, 8)), torch.randn(5, dtype=torch.float64)
        for shape in ((8,), (3, 8), (2, 3, 8), (2, 0, 8), (0, 8)):
            x = torch.randn(shape, dtype=torch.float64)
            for relu in (False, True):
                y = bsr_linear(x, values, indices, (5, 8), bias, relu)
                assert y.shape == (*shape[:-1], 5)
                close(y, gated(x @ weight.t() + bias, relu))

    def test_conv2d_takes_one_image_and_a_relu(self):
        values, indices = block_matrix((5, 3, 3, 3), (2, 2), 0.6)
        x = torch.randn(3, 6, 7, dtype=torch.float64)
        exact = dense_conv(x[None], weight_of_blocks(values, indices, (5, 3, 3, 3)), None, (1, 2), (1, 1, 0, 2), (1, 1))[0]
        for relu in (False, True):
            y = bsr_conv2d(x, values, indices, (5, 3, 3, 3), None, (1, 2), (1, 1, 0, 2), relu=relu)
            close(y, gated(exact, relu))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        values, indices = block_matrix((5, 8), (2, 3), 0.6, torch.float32)
        values, x = values.to(dtype), torch.randn(3, 8).to(dtype)
        y = bsr_linear(x, values, indices, (5, 8))
        assert y.dtype == dtype
        assert torch.equal(y, bsr_linear(x.float(), values.float(), indices, (5, 8)).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_returns_its_dtype_and_float32_gradients(self, dtype):
        values, indices = block_matrix((5, 8), (2, 3), 0.6, torch.float32)
        filters, places = block_matrix((5, 2, 3, 3), (2, 2), 0.6, torch.float32)
        values.requires_grad_(), filters.requires_grad_()
        x, images = torch.randn(3, 8), torch.randn(3, 2, 6, 7)
        with torch.autocast("cpu", dtype):
            y = bsr_linear(x, values, indices, (5, 8))
            z = bsr_conv2d(images.to(dtype), filters, places, (5, 2, 3, 3))
        assert (y.dtype, z.dtype) == (dtype, dtype)
        (y.sum() + z.sum()).backward()
        assert (values.grad.dtype, filters.grad.dtype) == (torch.float32, torch.float32)

    @pytest.mark.parametrize("device, stored", [("cpu", torch.float32), ("cuda", torch.float16)])
    def test_float16_is_stored_as_such_on_cuda_alone(self, device, stored):
        with FakeTensorMode():  # no device is needed to see what would be handed to it
            x, values = (torch.empty(*shape, device=device, dtype=torch.float16) for shape in ((3, 8), (2, 2, 3)))
            (x, values, _), result = functional._compute_dtype(x, values, None)
        assert (x.dtype, values.dtype, result) == (stored, torch.float32, torch.float16)

    def test_errors_name_expected_and_got(self):
        values, indices = block_matrix((5, 8), (2, 3), 0.6)
        filters, places = block_matrix((5, 2, 3, 3), (2, 2), 0.6)
        x = torch.randn(3, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"Expected x of shape \[..., 8\], got \(3, 7\)"):
            bsr_linear(x[:, :7], values, indices, (5, 8))
        with pytest.raises(ValueError, match="one dtype, got torch.float32, torch.float64"):
            bsr_linear(x.float(), values, indices, (5, 8))
        with pytest.raises(ValueError, match=r"a \[4, 3\] grid of blocks for a weight \[7, 8\], got \[3, 3\]"):
            bsr_linear(x, values, indices, (7, 8))
        with pytest.raises(ValueError, match=r"values of shape \[nblocks, bh, bw\], got \[1, 6\]"):
            bsr_linear(x, torch.randn(1, 6), indices, (5, 8))
        with pytest.raises(ValueError, match=r"Expected x of shape \[N, 2, H, W\]"):
            bsr_conv2d(torch.randn(1, 3, 6, 6).double(), filters, places, (5, 2, 3, 3))
        with pytest.raises(ValueError, match="padded image of at least 5 along dimension -1, got 4"):
            bsr_conv2d(torch.randn(1, 2, 6, 4).double(), filters, places, (5, 2, 3, 3), dilation=(2, 2))
