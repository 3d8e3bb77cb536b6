"""Derivatives of the operations on weights of whole blocks: the closed family of autograd.py, once more.

The joint backward that the CPU kernels of single weights have is not needed here: on tensor cores each pass reads what it
needs at its own rhythm.
"""

from __future__ import annotations

import torch

from grasp_sparse.ops.autograd import gated
from grasp_sparse.ops.differentiable import calls, differentiable

_NO_INDEX_GRADS = (None,) * 5


def _setup_spmm(ctx, inputs, output):
    values, *indices, _, x, _, relu = inputs
    ctx.save_for_backward(values, *indices, x, output if relu else None)


def _spmm_backward(ctx, grad):
    values, *indices, x, y = ctx.saved_tensors
    needs, grad = ctx.needs_input_grad, gated(grad, y)
    return (
        calls.bsr_sddmm(*indices, grad, x, values.shape[1:]) if needs[0] else None,
        *_NO_INDEX_GRADS,
        grad.sum(0, dtype=values.dtype) if needs[6] else None,
        calls.bsr_spmm_t(values, *indices, grad, x.shape[1]) if needs[7] else None,
        None,
        None,
    )


def _setup_spmm_t(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])


def _spmm_t_backward(ctx, grad):
    values, *indices, g = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        calls.bsr_sddmm(*indices, g, grad, values.shape[1:]) if needs[0] else None,
        *_NO_INDEX_GRADS,
        calls.bsr_spmm(values, *indices, None, grad, g.shape[1]) if needs[6] else None,
        None,
    )


def _setup_sddmm(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])


def _sddmm_backward(ctx, grad):
    *indices, g, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        *_NO_INDEX_GRADS,
        calls.bsr_spmm(grad, *indices, None, x, g.shape[1]) if needs[5] else None,
        calls.bsr_spmm_t(grad, *indices, g, x.shape[1]) if needs[6] else None,
        None,
    )


def _setup_fprop(ctx, inputs, output):
    values, *indices, _, x, _ = inputs[:9]
    *ctx.window, relu = inputs[9:]
    ctx.save_for_backward(values, *indices, x, output if relu else None)


def _fprop_backward(ctx, grad):
    values, *indices, x, y = ctx.saved_tensors
    needs, grad = ctx.needs_input_grad, gated(grad, y)
    return (
        calls.bsr_conv2d_wgrad(*indices, grad, x, values.shape[1:], *ctx.window) if needs[0] else None,
        *_NO_INDEX_GRADS,
        grad.sum((0, 2, 3), dtype=values.dtype) if needs[6] else None,
        calls.bsr_conv2d_dgrad(values, *indices, grad, x.shape[1], x.shape[2:], *ctx.window) if needs[7] else None,
        *(None,) * 6,
    )


def _setup_dgrad(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.window = inputs[9:]


def _dgrad_backward(ctx, grad):
    values, *indices, g = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        calls.bsr_conv2d_wgrad(*indices, g, grad, values.shape[1:], *ctx.window) if needs[0] else None,
        *_NO_INDEX_GRADS,
        calls.bsr_conv2d_fprop(values, *indices, None, grad, g.shape[1], *ctx.window) if needs[6] else None,
        *(None,) * 6,
    )


def _setup_wgrad(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.window = inputs[8:]


def _wgrad_backward(ctx, grad):
    *indices, g, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        *_NO_INDEX_GRADS,
        calls.bsr_conv2d_fprop(grad, *indices, None, x, g.shape[1], *ctx.window) if needs[5] else None,
        calls.bsr_conv2d_dgrad(grad, *indices, g, x.shape[1], x.shape[2:], *ctx.window) if needs[6] else None,
        *(None,) * 5,
    )


for _name, _backward, _setup in (
    ("bsr_spmm", _spmm_backward, _setup_spmm),
    ("bsr_spmm_t", _spmm_t_backward, _setup_spmm_t),
    ("bsr_sddmm", _sddmm_backward, _setup_sddmm),
    ("bsr_conv2d_fprop", _fprop_backward, _setup_fprop),
    ("bsr_conv2d_dgrad", _dgrad_backward, _setup_dgrad),
    ("bsr_conv2d_wgrad", _wgrad_backward, _setup_wgrad),
):
    differentiable(_name, _backward, _setup)
