"""What torch.utils.flop_counter.FlopCounterMode counts: 2 floating-point operations per kept weight and position."""

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
