"""The convolution family equals its reference and a dense formula, for every window, layout, batch and density."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    BATCHES,
    DENSITIES,
    DTYPES,
    IMAGE_LAYOUTS,
    WINDOWS,
    close,
    dense_conv,
    dense_matrix,
    same_layout_or_ambiguous,
    sparse_matrix,
)

from grasp_sparse.ops import reference

ops = torch.ops.grasp_sparse


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_reference_and_dense_formula(dtype, window, layout):
    lay, promised = IMAGE_LAYOUTS[layout]
    kernel, stride, padding, dilation, image = window
    channels, filters = 3, 5
    for density in DENSITIES:
        values, indices, mask = sparse_matrix(filters, channels * kernel[0] * kernel[1], density)
        weight = dense_matrix(values, mask).view(filters, channels, *kernel).requires_grad_()
        bias = torch.randn(filters, dtype=torch.float64)
        for batch in BATCHES:
            x = torch.randn(batch, channels, *image, dtype=torch.float64, requires_grad=True)
            expected = dense_conv(x, weight, bias, stride, padding, dilation)
            g = torch.randn_like(expected)
            expected_dx, expected_dw = torch.autograd.grad(expected, (x, weight), g)
            v, b, lx, lg = values.to(dtype), bias.to(dtype), lay(x.detach().to(dtype)), lay(g.to(dtype))
            case = f"density {density}, batch {batch}"

            y = ops.csr_conv2d_fprop(v, *indices, b, lx, kernel, stride, padding, dilation)
            close(y, expected, f"csr_conv2d_fprop, {case}")
            close(y, reference.csr_conv2d_fprop(values, *indices, bias, x, kernel, stride, padding, dilation), case)
            assert same_layout_or_ambiguous(lx, y, promised), case
            plain = ops.csr_conv2d_fprop(v, *indices, None, lx, kernel, stride, padding, dilation)
            close(plain, expected - bias[:, None, None], f"csr_conv2d_fprop without bias, {case}")

            dx = ops.csr_conv2d_dgrad(v, *indices, lg, image, kernel, stride, padding, dilation)
            close(dx, expected_dx, f"csr_conv2d_dgrad, {case}")
            close(dx, reference.csr_conv2d_dgrad(values, *indices, g, image, kernel, stride, padding, dilation), case)
            assert same_layout_or_ambiguous(lg, dx, promised), case

            dv = ops.csr_conv2d_wgrad(*indices, lg, lx, kernel, stride, padding, dilation)
            close(dv, expected_dw.flatten(1)[mask].unsqueeze(0), f"csr_conv2d_wgrad, {case}")
            close(dv, reference.csr_conv2d_wgrad(*indices, g, x, kernel, stride, padding, dilation), case)
            assert dv.is_contiguous()

            joint = ops.csr_conv2d_backward(v, *indices, lg, lx, kernel, stride, padding, dilation)
            for got, wanted in zip(joint, (expected_dx, expected_dw.flatten(1)[mask].unsqueeze(0), g.sum((0, 2, 3))), strict=True):
                close(got, wanted, f"csr_conv2d_backward, {case}")
            assert same_layout_or_ambiguous(lg, joint[0], promised), case


SIZES = {  # batch, in, out, image: crossing the sizes in which kernels cut their work
    "batch-64": (64, 4, 6, (8, 8)),
    "batch-100": (100, 3, 4, (5, 6)),
    "many-channels": (5, 70, 67, (4, 4)),
    "one-channel": (17, 1, 1, (9, 9)),
    "wide-image": (2, 3, 4, (3, 130)),
    "large-image": (2, 3, 4, (40, 37)),
}


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
def test_sizes(stride, size, layout):
    batch, channels, filters, image = size
    lay, _ = IMAGE_LAYOUTS[layout]
    window = ((3, 3), stride, (1, 1, 1, 1), (1, 1))
    values, indices, _ = sparse_matrix(filters, channels * 9, 0.15)
    x = torch.randn(batch, channels, *image, dtype=torch.float64)
    y = reference.csr_conv2d_fprop(values, *indices, None, x, *window)
    g = torch.randn_like(y)
    v, lx, lg = values.float(), lay(x.float()), lay(g.float())
    close(ops.csr_conv2d_fprop(v, *indices, None, lx, *window), y)
    close(ops.csr_conv2d_dgrad(v, *indices, lg, image, *window), reference.csr_conv2d_dgrad(values, *indices, g, image, *window))
    close(ops.csr_conv2d_wgrad(*indices, lg, lx, *window), reference.csr_conv2d_wgrad(*indices, g, x, *window))
    joint = ops.csr_conv2d_backward(v, *indices, lg, lx, *window)
    for got, wanted in zip(joint, reference.csr_conv2d_backward(values, *indices, g, x, *window), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("meant", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_of_one_channel_lie_as_they_were_meant_to(meant):
    """Their memory is the same in both layouts; the stride of the channel tells, and what follows keeps it, as in torch."""
    window = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    values, indices, _ = sparse_matrix(5, 9, 0.5)
    to_one, one_indices, _ = sparse_matrix(1, 45, 0.5)
    x = torch.randn(4, 1, 7, 8, dtype=torch.float64)
    lx = x.to(memory_format=meant)
    assert F.conv2d(lx, torch.ones(5, 1, 3, 3, dtype=torch.float64)).is_contiguous(memory_format=meant)
    y = ops.csr_conv2d_fprop(values, *indices, None, lx, *window)
    again = ops.csr_conv2d_fprop(to_one, *one_indices, None, y, *window)
    normed, *_ = ops.batch_norm_train(again, None, None, None, 1e-5, True)
    pooled, places = ops.max_pool2d(normed, (2, 2), (1, 1), (0, 0), (1, 1), False)
    back = ops.csr_conv2d_fprop(values, *indices, None, pooled, *window)
    close(y, reference.csr_conv2d_fprop(values, *indices, None, x, *window))
    for images in (y, back, ops.csr_conv2d_dgrad(to_one, *one_indices, pooled, pooled.shape[2:], *window)):
        assert images.shape[1] == 5 and images.is_contiguous(memory_format=meant)
    torch.library.opcheck(ops.csr_conv2d_fprop.default, (values, *indices, None, lx, *window))
    torch.library.opcheck(ops.batch_norm_train.default, (lx, None, None, None, 1e-5, True))


@pytest.mark.parametrize("x_layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("g_layout", IMAGE_LAYOUTS)
def test_weight_gradient_of_mixed_layouts(x_layout, g_layout):
    window = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    values, indices, _ = sparse_matrix(5, 27, 0.3)
    x, g = torch.randn(6, 3, 7, 8, dtype=torch.float64), torch.randn(6, 5, 7, 8, dtype=torch.float64)
    lg, lx = IMAGE_LAYOUTS[g_layout][0](g), IMAGE_LAYOUTS[x_layout][0](x)
    close(ops.csr_conv2d_wgrad(*indices, lg, lx, *window), reference.csr_conv2d_wgrad(*indices, g, x, *window))
    joint = ops.csr_conv2d_backward(values, *indices, lg, lx, *window)
    for got, wanted in zip(joint, reference.csr_conv2d_backward(values, *indices, g, x, *window), strict=True):
        close(got, wanted)


def test_expanded_arguments():
    """What y.sum().backward() hands on: one number with all strides zero; and a channel or batch that was expanded."""
    window = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    values, indices, _ = sparse_matrix(5, 27, 0.3)
    one = torch.ones((), dtype=torch.float64)
    sources = one, torch.randn(1, 5, 7, 8).double(), torch.randn(6, 5, 1, 1).double()
    grads = [source.expand(6, 5, 7, 8) for source in sources]
    x = torch.randn(6, 3, 1, 1, dtype=torch.float64).expand(6, 3, 7, 8)
    for g in grads:
        close(ops.csr_conv2d_dgrad(values, *indices, g, (7, 8), *window), reference.csr_conv2d_dgrad(values, *indices, g, (7, 8), *window))
        close(ops.csr_conv2d_wgrad(*indices, g, x, *window), reference.csr_conv2d_wgrad(*indices, g, x, *window))
    for v in (values, one.expand(1, indices.nnz), torch.stack((values, values), -1).flatten(1)[:, ::2]):
        bias = torch.randn(10, dtype=torch.float64)[::2]
        expected = reference.csr_conv2d_fprop(v, *indices, bias, x, *window)
        close(ops.csr_conv2d_fprop(v, *indices, bias, x, *window), expected)
