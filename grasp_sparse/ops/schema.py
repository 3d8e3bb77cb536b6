"""Schemas of the operations; the one place where their names and arguments are written down.

W is a weight matrix of which only ``values [1, nnz]`` are stored. ``crow_indices … permutation`` are the five tensors of
:class:`grasp_sparse.formats.CsrIndices`. Two closed families: in each, the gradient of every member is another member, so
derivatives of any order exist.

===================  ==========================  =======================================================
``csr_spmm``         y = x Wᵀ + b                x ``[N, K]``, y ``[N, M]``, W ``[M, K]``
``csr_spmm_t``       x = g W                     g ``[N, M]``
``csr_sddmm``        (gᵀ x) at the kept places   ``[1, nnz]``
``csr_conv2d_fprop`` y = conv2d(x, W) + b        x ``[N, I, H, W]``, W ``[O, I, kh, kw]`` as ``[O, I*kh*kw]``
``csr_conv2d_dgrad`` transposed convolution      g ``[N, O, H', W']``
``csr_conv2d_wgrad`` weight gradient             ``[1, nnz]``
===================  ==========================  =======================================================

``csr_spmm_backward`` and ``csr_conv2d_backward`` give what the backward pass of a layer asks for, (dx, dvalues, dbias), from
one walk over g and x; they are the transposed product, the sampled product and the sum of g. With ``relu``, ``csr_spmm`` gives
max(y, 0); its backward takes that y, and counts g as zero where y is not positive. Without ``input_grad`` dx is empty.

The same two families for weights of whole blocks, ``values [nblocks, bh, bw]``, the indices those of blocks (see
:mod:`grasp_sparse.formats.blocks`), and the sizes that a grid of blocks does not tell given: ``bsr_spmm``, ``bsr_spmm_t``,
``bsr_sddmm``, ``bsr_conv2d_fprop``, ``bsr_conv2d_dgrad``, ``bsr_conv2d_wgrad``. What values hold where a block reaches past the
weight counts for nothing; a gradient is zero there. With ``relu`` the result is max(y, 0).

And batch norm by the statistics of the batch, with what follows it in a network done on the way:

=======================  ==========================================================  ==================================
``batch_norm_train``     y = relu?((x - mean) / sqrt(var + eps) · w + b + residual)  x, residual, y ``[N, C, H, W]``
``batch_norm_backward``  the gradients of x, residual, w, b                          mean, var (biased), w, b ``[C]``
``batch_norm_eval``      the same y by statistics that are given                     in the dtype that is computed in
``batch_norm_follow_``   the running statistics follow those of a batch              ``count`` values per channel
=======================  ==========================================================  ==================================

On CUDA x may be bfloat16 or float16 beside float32 statistics, w and b. ``y`` is given to the backward where a residual was added before a ReLU; only then is there a gradient of the residual to
compute (otherwise it is g, and an empty tensor is returned).

A convolution of single weights and the batch norm behind it are ``csr_conv2d_norm_train``, z = conv2d(x, W) + bias and y of it as above,
and ``csr_conv2d_norm_backward``, which gives (dx, dvalues, dbias) and the gradients of residual, w and b: to rounding the same as of
the two operations, for which less goes through memory where the channels of an image lie side by side.

Max pooling is ``max_pool2d``, with one byte a window for its backward where torch keeps eight; ``padding`` there is (height, width).

``padding`` is (top, bottom, left, right), zeros. Activations come out in the layout they came in: row-major or
feature-major for linear; NCHW, channels_last or batch-innermost (CHWN) strides for conv.
"""

from __future__ import annotations

import torch

_INDICES = "Tensor crow_indices, Tensor col_indices, Tensor ccol_indices, Tensor row_indices, Tensor permutation"
_WINDOW = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"

SCHEMAS = {
    "csr_spmm": f"(Tensor values, {_INDICES}, Tensor? bias, Tensor x, bool relu=False) -> Tensor",
    "csr_spmm_t": f"(Tensor values, {_INDICES}, Tensor g) -> Tensor",
    "csr_sddmm": f"({_INDICES}, Tensor g, Tensor x) -> Tensor",
    "csr_spmm_backward": f"(Tensor values, {_INDICES}, Tensor g, Tensor x, Tensor? y=None, bool input_grad=True) -> (Tensor, Tensor, Tensor)",
    "csr_conv2d_fprop": f"(Tensor values, {_INDICES}, Tensor? bias, Tensor x, {_WINDOW}) -> Tensor",
    "csr_conv2d_dgrad": f"(Tensor values, {_INDICES}, Tensor g, SymInt[] input_size, {_WINDOW}) -> Tensor",
    "csr_conv2d_wgrad": f"({_INDICES}, Tensor g, Tensor x, {_WINDOW}) -> Tensor",
    "csr_conv2d_backward": f"(Tensor values, {_INDICES}, Tensor g, Tensor x, {_WINDOW}) -> (Tensor, Tensor, Tensor)",
}

BLOCK_SCHEMAS = {
    "bsr_spmm": f"(Tensor values, {_INDICES}, Tensor? bias, Tensor x, SymInt out_features, bool relu=False) -> Tensor",
    "bsr_spmm_t": f"(Tensor values, {_INDICES}, Tensor g, SymInt in_features) -> Tensor",
    "bsr_sddmm": f"({_INDICES}, Tensor g, Tensor x, SymInt[] block_size) -> Tensor",
    "bsr_conv2d_fprop": f"(Tensor values, {_INDICES}, Tensor? bias, Tensor x, SymInt out_channels, {_WINDOW}, bool relu=False) -> Tensor",
    "bsr_conv2d_dgrad": f"(Tensor values, {_INDICES}, Tensor g, SymInt in_channels, SymInt[] input_size, {_WINDOW}) -> Tensor",
    "bsr_conv2d_wgrad": f"({_INDICES}, Tensor g, Tensor x, SymInt[] block_size, {_WINDOW}) -> Tensor",
}

NORM_SCHEMAS = {
    "batch_norm_train": "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
    "batch_norm_backward": "(Tensor g, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
    "batch_norm_eval": "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool relu) -> Tensor",
    "batch_norm_follow_": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, SymInt count) -> ()",
}

# (y, z, mean, var), and (dx, dvalues, dbias, residual's, norm_weight's, norm_bias's); without `input_grad` dx is empty.
_NORM = "Tensor? norm_weight, Tensor? norm_bias"
CONV_NORM_SCHEMAS = {
    "csr_conv2d_norm_train": f"(Tensor values, {_INDICES}, Tensor? bias, Tensor x, Tensor? residual, {_NORM}, float eps, bool relu, "
    f"{_WINDOW}) -> (Tensor, Tensor, Tensor, Tensor)",
    "csr_conv2d_norm_backward": f"(Tensor values, {_INDICES}, Tensor g, Tensor x, Tensor z, Tensor? y, {_NORM}, Tensor mean, Tensor var, "
    f"float eps, bool relu, {_WINDOW}, bool input_grad=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}

# `places`, uint8 in the layout of y: which tap of its window each result came from, row by row; as torch picks it, the first of
# several largest ones, or the last NaN. At most 255 taps. Where no tap lies inside, y is -inf and places 255.
_POOL_WINDOW = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode"
POOL_SCHEMAS = {
    "max_pool2d": f"(Tensor x, {_POOL_WINDOW}) -> (Tensor, Tensor)",
    "max_pool2d_backward": f"(Tensor g, Tensor places, SymInt[] input_size, {_POOL_WINDOW}) -> Tensor",
}

# One optimizer step of a list of tensors of one dtype and device, in place. They belong to no family: nobody differentiates
# them. Every list is as long as `values`, or empty where it says so; no two tensors that are written share memory.
#
# `mask_bits` (may be empty): for each value either no bytes, and nothing is pruned, or one bit a weight in the order of
# grasp_sparse.bits over the value's weights in memory order (row-major if its memory has gaps). Where the bit is 0 the value and
# its state become exactly zero, whatever the gradient is.
#
# sgd_update_: `momentum_buffers` empty for plain SGD; with `first_step` they are started, whatever they held.
# adamw_update_: `steps`, one number each, count the steps taken before this one and are advanced.
#
# `found_inf`: one float32 number where the values are, written by whoever has seen the loss or the gradients; unless it is zero,
# nothing is changed. No device is waited for.
UPDATE_SCHEMAS = {
    "sgd_update_": (
        "(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] mask_bits, float lr, float momentum, "
        "float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step, Tensor? found_inf=None) -> ()"
    ),
    "adamw_update_": (
        "(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
        "Tensor[] mask_bits, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? found_inf=None) -> ()"
    ),
}

# The layout of the result follows the strides of the argument, so a compiler must not change them on the way in.
_TAGS = tuple(getattr(torch.Tag, tag) for tag in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, tag))

_library = torch.library.Library("grasp_sparse", "DEF")
for _name, _schema in (SCHEMAS | BLOCK_SCHEMAS | NORM_SCHEMAS | CONV_NORM_SCHEMAS | POOL_SCHEMAS | UPDATE_SCHEMAS).items():
    _library.define(_name + _schema, tags=_TAGS)
