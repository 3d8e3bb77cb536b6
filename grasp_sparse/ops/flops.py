"""What torch.utils.flop_counter.FlopCounterMode counts: 2 floating-point operations per kept weight and position. Blocks count
whole, as they are computed."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.grasp_sparse


@register_flop_formula([_ops.csr_spmm, _ops.csr_spmm_t])
def _product_flops(values, crow, col, ccol, row, permutation, *rest, out_shape=None, **_):
    return 2 * col[0] * out_shape[0]


@register_flop_formula(_ops.csr_sddmm)
def _sampled_flops(crow, col, ccol, row, permutation, g, x, *_, **__):
    return 2 * col[0] * g[0]


@register_flop_formula(_ops.csr_spmm_backward)
def _linear_backward_flops(values, crow, col, ccol, row, permutation, g, x, y=None, input_grad=True, **_):
    return (4 if input_grad else 2) * col[0] * g[0]


@register_flop_formula(_ops.csr_conv2d_fprop)
def _fprop_flops(values, crow, col, ccol, row, permutation, bias, x, *_, out_shape=None, **__):
    return 2 * col[0] * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(_ops.csr_conv2d_dgrad)
def _dgrad_flops(values, crow, col, ccol, row, permutation, g, *_, **__):
    return 2 * col[0] * g[0] * math.prod(g[2:])


@register_flop_formula(_ops.csr_conv2d_wgrad)
def _wgrad_flops(crow, col, ccol, row, permutation, g, *_, **__):
    return 2 * col[0] * g[0] * math.prod(g[2:])


@register_flop_formula(_ops.csr_conv2d_backward)
def _conv_backward_flops(values, crow, col, ccol, row, permutation, g, *_, **__):
    return 4 * col[0] * g[0] * math.prod(g[2:])


@register_flop_formula(_ops.csr_conv2d_norm_train)
def _conv_norm_flops(values, crow, col, *_, out_shape=None, **__):
    y = out_shape[0]
    return 2 * col[0] * y[0] * math.prod(y[2:])


@register_flop_formula(_ops.csr_conv2d_norm_backward)
def _conv_norm_backward_flops(
    values, crow, col, ccol, row, permutation, g, x, z, y, norm_weight, norm_bias, mean, var, eps, relu, kernel_size, stride, padding,
    dilation, input_grad=True, **_,
):  # fmt: skip
    return (4 if input_grad else 2) * col[0] * g[0] * math.prod(g[2:])


@register_flop_formula([_ops.bsr_spmm, _ops.bsr_spmm_t])
def _block_product_flops(values, crow, col, ccol, row, permutation, *_, out_shape=None, **__):
    return 2 * math.prod(values) * out_shape[0]


@register_flop_formula(_ops.bsr_sddmm)
def _block_sampled_flops(crow, col, ccol, row, permutation, g, x, *_, out_shape=None, **__):
    return 2 * math.prod(out_shape) * g[0]


@register_flop_formula(_ops.bsr_conv2d_fprop)
def _block_fprop_flops(values, crow, col, ccol, row, permutation, *_, out_shape=None, **__):
    return 2 * math.prod(values) * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(_ops.bsr_conv2d_dgrad)
def _block_dgrad_flops(values, crow, col, ccol, row, permutation, g, *_, **__):
    return 2 * math.prod(values) * g[0] * math.prod(g[2:])


@register_flop_formula(_ops.bsr_conv2d_wgrad)
def _block_wgrad_flops(crow, col, ccol, row, permutation, g, *_, out_shape=None, **__):
    return 2 * math.prod(out_shape) * g[0] * math.prod(g[2:])
