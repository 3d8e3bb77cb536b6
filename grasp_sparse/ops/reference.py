"""The definition of every operation in plain torch: the fallback on any device, and what kernels are tested against.

Each sparse one builds the dense weight, so it is right and simple, not fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from grasp_sparse.formats import CsrIndices, gather_values, scatter_values
from grasp_sparse.ops import dense
from grasp_sparse.ops.layout import empty_images
from grasp_sparse.ops.schema import CONV_NORM_SCHEMAS, NORM_SCHEMAS, SCHEMAS


def csr_spmm(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, relu=False):
    weight = _matrix(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation))
    return dense.linear(weight, bias, x, relu)


def csr_spmm_t(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g):
    weight = _matrix(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation))
    return dense.linear_t(weight, g)


def csr_sddmm(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x):
    return gather_values(dense.computed(g).t() @ dense.computed(x), CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation))


def csr_spmm_backward(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, y=None, input_grad=True):
    indices = (crow_indices, col_indices, ccol_indices, row_indices, permutation)
    if y is not None:
        g = torch.where(y <= 0, 0, g if y.stride() == g.stride() else g.contiguous())
    return csr_spmm_t(values, *indices, g) if input_grad else g.new_empty(0), csr_sddmm(*indices, g, x), dense.computed(g).sum(0)


def csr_conv2d_fprop(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, kernel_size, stride, padding, dilation
):
    weight = _filters(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation), kernel_size)
    return dense.fprop(weight, bias, x, stride, padding, dilation)


def csr_conv2d_dgrad(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, input_size, kernel_size, stride, padding, dilation
):
    weight = _filters(values, CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation), kernel_size)
    return dense.dgrad(weight, g, input_size, stride, padding, dilation)


def csr_conv2d_wgrad(
    crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, kernel_size, stride, padding, dilation
):
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    return gather_values(dense.wgrad(g, x, kernel_size, stride, padding, dilation), indices)


def csr_conv2d_backward(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, kernel_size, stride, padding, dilation
):
    indices = (crow_indices, col_indices, ccol_indices, row_indices, permutation)
    window = (kernel_size, stride, padding, dilation)
    dx = csr_conv2d_dgrad(values, *indices, g, x.shape[2:], *window)
    return dx, csr_conv2d_wgrad(*indices, g, x, *window), dense.computed(g).sum((0, 2, 3))


def batch_norm_train(x, residual, weight, bias, eps, relu):
    var, mean = torch.var_mean(dense.computed(x), (0, 2, 3), correction=0)
    return batch_norm_eval(x, residual, weight, bias, mean, var, eps, relu), mean, var


def batch_norm_eval(x, residual, weight, bias, mean, var, eps, relu):
    y = _normalised(dense.computed(x), weight, bias, mean, var, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return empty_images(x, x.shape).copy_(y)


def batch_norm_eval_backward(g, x, y, weight, mean, var, eps):
    """The gradients of x, residual, weight and bias; y where a ReLU gave it. Differentiable any number of times."""
    g_residual = g if y is None else torch.where(y <= 0, 0, g)
    g, inverse = dense.computed(g_residual), _columns((var + eps).rsqrt())
    gx = g * (inverse if weight is None else inverse * _columns(weight))
    unit = (dense.computed(x) - _columns(mean)) * inverse
    return gx.to(x.dtype), g_residual, (g * unit).sum((0, 2, 3)), g.sum((0, 2, 3))


def batch_norm_follow_(running_mean, running_var, mean, var, momentum, count):
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))  # the running variance is unbiased


def batch_norm_backward(g, x, y, weight, bias, mean, var, eps, relu):
    """Also differentiable: with mean and var as functions of x, the derivative of this is the second one of batch norm."""
    like, x, g = x, dense.computed(x), dense.computed(g)
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
    residual = like.new_empty(0) if y is None else empty_images(like, x.shape).copy_(g)
    return empty_images(like, x.shape).copy_(gx), residual, g_weight, g_bias


def csr_conv2d_norm_train(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, residual, norm_weight, norm_bias, eps, relu,
    kernel_size, stride, padding, dilation,
):  # fmt: skip
    indices = (crow_indices, col_indices, ccol_indices, row_indices, permutation)
    z = csr_conv2d_fprop(values, *indices, bias, x, kernel_size, stride, padding, dilation)
    y, mean, var = batch_norm_train(z, residual, norm_weight, norm_bias, eps, relu)
    return y, z, mean, var


def csr_conv2d_norm_backward(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, z, y, norm_weight, norm_bias, mean, var, eps, relu,
    kernel_size, stride, padding, dilation, input_grad=True,
):  # fmt: skip
    indices, window = (crow_indices, col_indices, ccol_indices, row_indices, permutation), (kernel_size, stride, padding, dilation)
    gz, *g_norm = batch_norm_backward(g, z, y, norm_weight, norm_bias, mean, var, eps, relu)
    dx, dvalues, dbias = csr_conv2d_backward(values, *indices, gz, x, *window)
    return dx if input_grad else x.new_empty(0), dvalues, dbias, *g_norm


def _columns(vector: Tensor) -> Tensor:
    """``[C]`` as it broadcasts against ``[N, C, H, W]``."""
    return vector[:, None, None]


def _normalised(x, weight, bias, mean, var, eps) -> Tensor:
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = (x - _columns(mean)) * _columns(scale)
    return y if bias is None else y + _columns(bias)


def _matrix(values: Tensor, indices: CsrIndices) -> Tensor:
    return scatter_values(values, indices, indices.shape)


def _filters(values: Tensor, indices: CsrIndices, kernel_size) -> Tensor:
    rows, cols = indices.shape
    kh, kw = kernel_size
    return scatter_values(values, indices, (rows, cols // (kh * kw), kh, kw))


def without_autocast(function: Callable) -> Callable:
    """The caller has chosen the dtype; autocast must not choose another one inside."""

    @functools.wraps(function)
    def run(*args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args)

    return run


_library = torch.library.Library("grasp_sparse", "IMPL")
for _name in SCHEMAS | NORM_SCHEMAS | CONV_NORM_SCHEMAS:
    _library.impl(_name, without_autocast(globals()[_name]), "CompositeExplicitAutograd")
