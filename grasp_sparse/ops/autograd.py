"""Derivatives: each formula is written in members of the same family, so they can be differentiated again.

With L a scalar, G = dL/dy and everything bilinear:

* y = fprop(v, x) + b   dv = wgrad(G, x)    dx = dgrad(v, G)    db = ΣG
* x = dgrad(v, g)       dv = wgrad(g, G)    dg = fprop(v, G)
* v = wgrad(g, x)       dg = fprop(G, x)    dx = dgrad(G, g)

The gradients of the first line are one operation, ``…_backward``. Its own derivative is the sum of the second line (G = Gx), the
third (G = Gv) and that of the sum over g. Behind a ReLU, G and g count only where its result is positive.

Batch norm and max pooling have backward kernels; where those must themselves be differentiated (``create_graph=True``), the same gradients
are computed by ordinary torch operations instead. So are those of batch norm by given statistics, always. A convolution with its
norm is then one after the other, from x on.
"""

from __future__ import annotations

import torch

from grasp_sparse.ops import reference, reference_pool
from grasp_sparse.ops.dense import computed
from grasp_sparse.ops.differentiable import calls, differentiable

_ops = torch.ops.grasp_sparse
_NO_INDEX_GRADS = (None,) * 5


def _setup_spmm(ctx, inputs, output):
    values, *indices, _, x, relu = inputs
    ctx.save_for_backward(values, *indices, x, output if relu else None)


def _spmm_backward(ctx, grad):
    values, *indices, x, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if needs[0]:
        dx, dvalues, dbias = calls.csr_spmm_backward(values, *indices, grad, x, y, needs[7])
        return dvalues, *_NO_INDEX_GRADS, dbias if needs[6] else None, dx if needs[7] else None, None
    grad = gated(grad, y)
    return (
        None,
        *_NO_INDEX_GRADS,
        grad.sum(0, dtype=values.dtype) if needs[6] else None,
        calls.csr_spmm_t(values, *indices, grad) if needs[7] else None,
        None,
    )


def gated(grad, y):
    """What a ReLU that gave y lets back."""
    return grad if y is None else torch.where(y <= 0, 0, grad)  # in the strides of grad


def _setup_spmm_t(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _spmm_t_backward(ctx, grad):
    values, *indices, g = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        calls.csr_sddmm(*indices, g, grad) if needs[0] else None,
        *_NO_INDEX_GRADS,
        calls.csr_spmm(values, *indices, None, grad) if needs[6] else None,
    )


def _setup_sddmm(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _sddmm_backward(ctx, grad):
    *indices, g, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        *_NO_INDEX_GRADS,
        calls.csr_spmm(grad, *indices, None, x) if needs[5] else None,
        calls.csr_spmm_t(grad, *indices, g) if needs[6] else None,
    )


def _setup_linear_backward(ctx, inputs, output):
    *tensors, ctx.input_grad = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward_backward(ctx, grad_dx, grad_dvalues, grad_dbias):
    values, *indices, g, x, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    g = gated(g, y)
    if not ctx.input_grad:
        grad_dx = torch.zeros_like(x)
    return (
        calls.csr_sddmm(*indices, g, grad_dx) if needs[0] else None,
        *_NO_INDEX_GRADS,
        gated(calls.csr_spmm(values, *indices, grad_dbias, grad_dx) + calls.csr_spmm(grad_dvalues, *indices, None, x), y)
        if needs[6]
        else None,
        calls.csr_spmm_t(grad_dvalues, *indices, g) if needs[7] else None,
        None,
        None,
    )


def _setup_fprop(ctx, inputs, output):
    values, *indices, _, x = inputs[:8]
    ctx.save_for_backward(values, *indices, x)
    ctx.window = inputs[8:]


def _fprop_backward(ctx, grad):
    return *_fprop_gradients(ctx, *ctx.saved_tensors, grad), *(None,) * 4


def _fprop_gradients(ctx, *tensors):
    """Those of values, no indices, bias and x, as far as they are asked for; of values, indices, x and the gradient of the result."""
    values, *indices, x, grad = tensors
    needs = ctx.needs_input_grad
    if needs[0] and needs[7]:
        dx, dvalues, dbias = calls.csr_conv2d_backward(values, *indices, grad, x, *ctx.window)
        return dvalues, *_NO_INDEX_GRADS, dbias if needs[6] else None, dx
    return (
        calls.csr_conv2d_wgrad(*indices, grad, x, *ctx.window) if needs[0] else None,
        *_NO_INDEX_GRADS,
        grad.sum((0, 2, 3), dtype=values.dtype) if needs[6] else None,
        calls.csr_conv2d_dgrad(values, *indices, grad, x.shape[2:], *ctx.window) if needs[7] else None,
    )


def _setup_dgrad(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.window = inputs[8:]


def _dgrad_backward(ctx, grad):
    values, *indices, g = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        calls.csr_conv2d_wgrad(*indices, g, grad, *ctx.window) if needs[0] else None,
        *_NO_INDEX_GRADS,
        calls.csr_conv2d_fprop(values, *indices, None, grad, *ctx.window) if needs[6] else None,
        *(None,) * 5,
    )


def _setup_wgrad(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.window = inputs[7:]


def _wgrad_backward(ctx, grad):
    *indices, g, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        *_NO_INDEX_GRADS,
        calls.csr_conv2d_fprop(grad, *indices, None, x, *ctx.window) if needs[5] else None,
        calls.csr_conv2d_dgrad(grad, *indices, g, x.shape[2:], *ctx.window) if needs[6] else None,
        *(None,) * 4,
    )


def _setup_conv_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.window = inputs[8:]


def _conv_backward_backward(ctx, grad_dx, grad_dvalues, grad_dbias):
    values, *indices, g, x = ctx.saved_tensors
    needs, fprop = ctx.needs_input_grad, calls.csr_conv2d_fprop
    return (
        calls.csr_conv2d_wgrad(*indices, g, grad_dx, *ctx.window) if needs[0] else None,
        *_NO_INDEX_GRADS,
        fprop(values, *indices, grad_dbias, grad_dx, *ctx.window) + fprop(grad_dvalues, *indices, None, x, *ctx.window)
        if needs[6]
        else None,
        calls.csr_conv2d_dgrad(grad_dvalues, *indices, g, x.shape[2:], *ctx.window) if needs[7] else None,
        *(None,) * 4,
    )


def _setup_batch_norm(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.relu = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)  # they serve the running statistics and the backward
    ctx.set_materialize_grads(False)  # nobody reads zeros for those two
    # Without a residual the backward sees from x where the ReLU was open, and nothing keeps y alive.
    ctx.save_for_backward(x, y if ctx.relu and residual is not None else None, weight, bias, mean, var)


def _batch_norm_backward(ctx, grad, _mean, _var):
    if grad is None:
        return (None,) * 6
    x, y, weight, bias, mean, var = ctx.saved_tensors
    backward = _ops.batch_norm_backward
    if torch.is_grad_enabled():
        backward = reference.batch_norm_backward
        var, mean = torch.var_mean(computed(x), (0, 2, 3), correction=0)
    gx, g_residual, g_weight, g_bias = backward(grad, x, y, weight, bias, mean, var, ctx.eps, ctx.relu)
    needs = ctx.needs_input_grad
    return (
        gx if needs[0] else None,
        (grad if y is None else g_residual) if needs[1] else None,
        g_weight if needs[2] else None,
        g_bias if needs[3] else None,
        None,
        None,
    )


def _setup_conv_norm(ctx, inputs, output):
    values, *indices, bias, x, residual, weight, norm_bias, ctx.eps, ctx.relu = inputs[:13]
    ctx.window = inputs[13:]
    y, z, mean, var = output
    ctx.mark_non_differentiable(z, mean, var)
    ctx.set_materialize_grads(False)
    gate = y if ctx.relu and residual is not None else None
    ctx.save_for_backward(values, *indices, bias, x, z, gate, weight, norm_bias, mean, var)


def _conv_norm_backward(ctx, grad, _z, _mean, _var):
    if grad is None:
        return (None,) * 17
    values, *indices, bias, x, z, y, weight, norm_bias, mean, var = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if needs[0] and not torch.is_grad_enabled():
        dx, dvalues, dbias, g_residual, g_weight, g_norm_bias = _ops.csr_conv2d_norm_backward(
            values, *indices, grad, x, z, y, weight, norm_bias, mean, var, ctx.eps, ctx.relu, *ctx.window, needs[7]
        )
        of_conv = dvalues, *_NO_INDEX_GRADS, dbias if needs[6] else None, dx if needs[7] else None
    else:
        backward = _ops.batch_norm_backward
        if torch.is_grad_enabled():
            backward, z = reference.batch_norm_backward, calls.csr_conv2d_fprop(values, *indices, bias, x, *ctx.window)
            var, mean = torch.var_mean(computed(z), (0, 2, 3), correction=0)
        gz, g_residual, g_weight, g_norm_bias = backward(grad, z, y, weight, norm_bias, mean, var, ctx.eps, ctx.relu)
        of_conv = _fprop_gradients(ctx, values, *indices, x, gz)
    return (
        *of_conv,
        (grad if y is None else g_residual) if needs[8] else None,
        g_weight if needs[9] else None,
        g_norm_bias if needs[10] else None,
        *(None,) * 6,
    )


def _setup_batch_norm_eval(ctx, inputs, output):
    x, residual, weight, bias, mean, var, ctx.eps, relu = inputs
    ctx.save_for_backward(x, output if relu else None, weight, mean, var)


def _batch_norm_eval_backward(ctx, grad):
    gradients = reference.batch_norm_eval_backward(grad, *ctx.saved_tensors, ctx.eps)
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False))
    return *wanted, *(None,) * 4


def _setup_max_pool(ctx, inputs, output):
    x, *ctx.window = inputs
    ctx.input_size = x.shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _max_pool_backward(ctx, grad, _places):
    if grad is None:
        return (None,) * 6
    backward = reference_pool.max_pool2d_backward if torch.is_grad_enabled() else _ops.max_pool2d_backward
    return backward(grad, *ctx.saved_tensors, ctx.input_size, *ctx.window), *(None,) * 5


for _name, _backward, _setup in (
    ("max_pool2d", _max_pool_backward, _setup_max_pool),
    ("csr_spmm", _spmm_backward, _setup_spmm),
    ("csr_spmm_t", _spmm_t_backward, _setup_spmm_t),
    ("csr_sddmm", _sddmm_backward, _setup_sddmm),
    ("csr_spmm_backward", _linear_backward_backward, _setup_linear_backward),
    ("csr_conv2d_fprop", _fprop_backward, _setup_fprop),
    ("csr_conv2d_dgrad", _dgrad_backward, _setup_dgrad),
    ("csr_conv2d_wgrad", _wgrad_backward, _setup_wgrad),
    ("csr_conv2d_backward", _conv_backward_backward, _setup_conv_backward),
    ("batch_norm_train", _batch_norm_backward, _setup_batch_norm),
    ("csr_conv2d_norm_train", _conv_norm_backward, _setup_conv_norm),
    ("batch_norm_eval", _batch_norm_eval_backward, _setup_batch_norm_eval),
):
    differentiable(_name, _backward, _setup)
