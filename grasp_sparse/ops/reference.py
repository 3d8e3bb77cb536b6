"""The definition of every operation in plain torch: the fallback on any device, and what kernels are tested against.

Each sparse one builds the dense weight, so it is right and simple, not fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_sparse.formats import CsrIndices, gather_values, scatter_values
from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import empty_images, empty_rows, output_size
from grasp_sparse.ops.schema import NORM_SCHEMAS, SCHEMAS


def csr_spmm(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, relu=False):
    weight = _matrix(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation))
    y = F.linear(_computed(x), weight, bias)
    return empty_rows(x, (x.shape[0], weight.shape[0])).copy_(y.relu() if relu else y)


def csr_spmm_t(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g):
    weight = _matrix(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation))
    return empty_rows(g, (g.shape[0], weight.shape[1])).copy_(_computed(g) @ weight)


def csr_sddmm(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x):
    return gather_values(_computed(g).t() @ _computed(x), CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation))


def csr_spmm_backward(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, y=None, input_grad=True):
    indices = (crow_indices, col_indices, ccol_indices, row_indices, permutation)
    if y is not None:
        g = torch.where(y <= 0, 0, g if y.stride() == g.stride() else g.contiguous())
    return csr_spmm_t(values, *indices, g) if input_grad else g.new_empty(0), csr_sddmm(*indices, g, x), _computed(g).sum(0)


def csr_conv2d_fprop(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, kernel_size, stride, padding, dilation
):
    weight = _filters(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation), kernel_size)
    size = (x.shape[0], weight.shape[0], *output_size(x.shape[2:], kernel_size, stride, padding, dilation))
    if weight.numel() == 0:  # torch refuses no output channels, and from no input channels makes no output channels
        y = x.new_zeros(size) if bias is None else bias.view(-1, 1, 1).expand(size)
    else:
        y = F.conv2d(_pad(_computed(x), padding), weight, bias, tuple(stride), 0, tuple(dilation))
    return empty_images(x, size).copy_(y)


def csr_conv2d_dgrad(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, input_size, kernel_size, stride, padding, dilation
):
    weight = _filters(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation), kernel_size)
    top, bottom, left, right = padding
    height, width = input_size
    padded = weight.new_zeros(g.shape[0], weight.shape[1], height + top + bottom, width + left + right)
    dx, _ = _conv_backward(_computed(g), padded, weight, stride, dilation, (True, False))
    dx = dx[:, :, top : top + height, left : left + width]
    return empty_images(g, dx.shape).copy_(dx)


def csr_conv2d_wgrad(
    crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, kernel_size, stride, padding, dilation
):
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    x = _computed(x)
    weight = x.new_zeros(g.shape[1], x.shape[1], *kernel_size)
    _, dw = _conv_backward(_computed(g), _pad(x, padding), weight, stride, dilation, (False, True))
    return gather_values(dw, indices)


def csr_conv2d_backward(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, kernel_size, stride, padding, dilation
):
    indices = (crow_indices, col_indices, ccol_indices, row_indices, permutation)
    window = (kernel_size, stride, padding, dilation)
    dx = csr_conv2d_dgrad(values, *indices, g, x.shape[2:], *window)
    return dx, csr_conv2d_wgrad(*indices, g, x, *window), _computed(g).sum((0, 2, 3))


def batch_norm_train(x, residual, weight, bias, eps, relu):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    y = _normalised(x, weight, bias, mean, var, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return empty_images(x, x.shape).copy_(y), mean, var


def batch_norm_backward(g, x, y, weight, bias, mean, var, eps, relu):
    """Also differentiable: with mean and var as functions of x, the derivative of this is the second one of batch norm."""
    if relu:
        positive = ~((_normalised(x, weight, bias, mean, var, eps) if y is None else y) <= 0)  # true for NaN, as in torch
        g = torch.where(positive, g, 0)
    inverse = _columns((var + eps).rsqrt())
    unit = (x - _columns(mean)) * inverse
    g_weight, g_bias = (g * unit).sum((0, 2, 3)), g.sum((0, 2, 3))
    count = x.numel() // x.shape[1]
    gx = (g - _columns(g_bias / count) - unit * _columns(g_weight / count)) * inverse
    if weight is not None:
        gx = gx * _columns(weight)
    residual = x.new_empty(0) if y is None else empty_images(x, x.shape).copy_(g)
    return empty_images(x, x.shape).copy_(gx), residual, g_weight, g_bias


def _columns(vector: Tensor) -> Tensor:
    """``[C]`` as it broadcasts against ``[N, C, H, W]``."""
    return vector[:, None, None]


def _normalised(x, weight, bias, mean, var, eps) -> Tensor:
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = (x - _columns(mean)) * _columns(scale)
    return y if bias is None else y + _columns(bias)


def _computed(activations: Tensor) -> Tensor:
    return activations.to(compute_dtype(activations.dtype))


def _matrix(values: Tensor, indices: CsrIndices) -> Tensor:
    return scatter_values(values, indices, indices.shape)


def _filters(values: Tensor, indices: CsrIndices, kernel_size) -> Tensor:
    rows, cols = indices.shape
    kh, kw = kernel_size
    return scatter_values(values, indices, (rows, cols // (kh * kw), kh, kw))


def _pad(x: Tensor, padding) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


def _conv_backward(g, x, weight, stride, dilation, wanted: tuple[bool, bool]):
    # A batch of zero: torch's own backward refuses it on some back-ends, and the answer is known.
    if g.numel() == 0 or weight.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, list(stride), [0, 0], list(dilation), False, [0, 0], 1, [*wanted, False]
    )
    return dx, dw


def _without_autocast(function: Callable) -> Callable:
    """The caller has chosen the dtype; autocast must not choose another one inside."""

    @functools.wraps(function)
    def run(*args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args)

    return run


_library = torch.library.Library("grasp_sparse", "IMPL")
for _name in SCHEMAS | NORM_SCHEMAS:
    _library.impl(_name, _without_autocast(globals()[_name]), "CompositeExplicitAutograd")
