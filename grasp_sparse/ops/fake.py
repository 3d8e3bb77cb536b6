"""Shapes, types and layouts of the results without computing them: what torch.compile and export trace with."""

from __future__ import annotations

import torch

from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import empty_images, empty_rows, output_size, pooled_size
from grasp_sparse.ops.schema import UPDATE_SCHEMAS

_register = torch.library.register_fake


@_register("grasp_sparse::csr_spmm")
def _(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, relu=False):
    torch._check(x.dim() == 2, lambda: f"csr_spmm: Expected x [N, K], got {x.dim()}-D")
    return empty_rows(x, (x.shape[0], crow_indices.shape[0] - 1))


@_register("grasp_sparse::csr_spmm_t")
def _(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g):
    torch._check(g.dim() == 2, lambda: f"csr_spmm_t: Expected g [N, M], got {g.dim()}-D")
    return empty_rows(g, (g.shape[0], ccol_indices.shape[0] - 1))


@_register("grasp_sparse::csr_sddmm")
def _(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x):
    torch._check(g.shape[0] == x.shape[0], lambda: f"csr_sddmm: Expected equal batches, got {g.shape[0]} and {x.shape[0]}")
    return x.new_empty(1, col_indices.shape[0], dtype=compute_dtype(x.dtype))


@_register("grasp_sparse::csr_spmm_backward")
def _(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, y=None, input_grad=True):
    torch._check(g.shape[0] == x.shape[0], lambda: f"csr_spmm_backward: Expected equal batches, got {g.shape[0]} and {x.shape[0]}")
    dtype = compute_dtype(x.dtype)
    if y is not None and y.stride() != g.stride():
        g = g.contiguous()
    return empty_rows(g, x.shape) if input_grad else g.new_empty(0), x.new_empty(1, col_indices.shape[0], dtype=dtype), x.new_empty(crow_indices.shape[0] - 1, dtype=dtype)


@_register("grasp_sparse::csr_conv2d_fprop")
def _(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, kernel_size, stride, padding, dilation
):
    torch._check(x.dim() == 4, lambda: f"csr_conv2d_fprop: Expected x [N, C, H, W], got {x.dim()}-D")
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return empty_images(x, (x.shape[0], crow_indices.shape[0] - 1, height, width))


@_register("grasp_sparse::csr_conv2d_dgrad")
def _(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, input_size, kernel_size, stride, padding, dilation
):
    torch._check(g.dim() == 4, lambda: f"csr_conv2d_dgrad: Expected g [N, C, H, W], got {g.dim()}-D")
    channels = (ccol_indices.shape[0] - 1) // (kernel_size[0] * kernel_size[1])
    return empty_images(g, (g.shape[0], channels, *input_size))


@_register("grasp_sparse::csr_conv2d_wgrad")
def _(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, kernel_size, stride, padding, dilation):
    torch._check(g.shape[0] == x.shape[0], lambda: f"csr_conv2d_wgrad: Expected equal batches, got {g.shape[0]} and {x.shape[0]}")
    return x.new_empty(1, col_indices.shape[0], dtype=compute_dtype(x.dtype))


@_register("grasp_sparse::csr_conv2d_backward")
def _(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, kernel_size, stride, padding, dilation):
    torch._check(g.shape[0] == x.shape[0], lambda: f"csr_conv2d_backward: Expected equal batches, got {g.shape[0]} and {x.shape[0]}")
    dtype = compute_dtype(x.dtype)
    return empty_images(g, x.shape), x.new_empty(1, col_indices.shape[0], dtype=dtype), x.new_empty(crow_indices.shape[0] - 1, dtype=dtype)


@_register("grasp_sparse::bsr_spmm")
def _(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, out_features, relu=False):
    torch._check(x.dim() == 2, lambda: f"bsr_spmm: Expected x [N, K], got {x.dim()}-D")
    return empty_rows(x, (x.shape[0], out_features))


@_register("grasp_sparse::bsr_spmm_t")
def _(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, in_features):
    torch._check(g.dim() == 2, lambda: f"bsr_spmm_t: Expected g [N, M], got {g.dim()}-D")
    return empty_rows(g, (g.shape[0], in_features))


@_register("grasp_sparse::bsr_sddmm")
def _(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, block_size):
    torch._check(g.shape[0] == x.shape[0], lambda: f"bsr_sddmm: Expected equal batches, got {g.shape[0]} and {x.shape[0]}")
    return x.new_empty(col_indices.shape[0], *block_size, dtype=compute_dtype(x.dtype))


@_register("grasp_sparse::bsr_conv2d_fprop")
def _(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, out_channels,
    kernel_size, stride, padding, dilation, relu=False,
):  # fmt: skip
    torch._check(x.dim() == 4, lambda: f"bsr_conv2d_fprop: Expected x [N, C, H, W], got {x.dim()}-D")
    return empty_images(x, (x.shape[0], out_channels, *output_size(x.shape[2:], kernel_size, stride, padding, dilation)))


@_register("grasp_sparse::bsr_conv2d_dgrad")
def _(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, in_channels, input_size,
    kernel_size, stride, padding, dilation,
):  # fmt: skip
    torch._check(g.dim() == 4, lambda: f"bsr_conv2d_dgrad: Expected g [N, C, H, W], got {g.dim()}-D")
    return empty_images(g, (g.shape[0], in_channels, *input_size))


@_register("grasp_sparse::bsr_conv2d_wgrad")
def _(
    crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, block_size, kernel_size, stride, padding, dilation
):
    torch._check(g.shape[0] == x.shape[0], lambda: f"bsr_conv2d_wgrad: Expected equal batches, got {g.shape[0]} and {x.shape[0]}")
    return x.new_empty(col_indices.shape[0], *block_size, dtype=compute_dtype(x.dtype))


@_register("grasp_sparse::batch_norm_train")
def _(x, residual, weight, bias, eps, relu):
    torch._check(x.dim() == 4, lambda: f"batch_norm_train: Expected x [N, C, H, W], got {x.dim()}-D")
    return empty_images(x, x.shape), _per_channel(x), _per_channel(x)


def _per_channel(x):
    return x.new_empty(x.shape[1], dtype=compute_dtype(x.dtype))


@_register("grasp_sparse::batch_norm_eval")
def _(x, residual, weight, bias, mean, var, eps, relu):
    torch._check(x.dim() == 4, lambda: f"batch_norm_eval: Expected x [N, C, H, W], got {x.dim()}-D")
    return empty_images(x, x.shape)


@_register("grasp_sparse::batch_norm_backward")
def _(g, x, y, weight, bias, mean, var, eps, relu):
    torch._check(g.shape == x.shape, lambda: f"batch_norm_backward: Expected g {tuple(x.shape)}, got {tuple(g.shape)}")
    residual = x.new_empty(0) if y is None else empty_images(x, x.shape)
    return empty_images(x, x.shape), residual, _per_channel(x), _per_channel(x)


@_register("grasp_sparse::csr_conv2d_norm_train")
def _(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, residual, norm_weight, norm_bias, eps, relu,
    kernel_size, stride, padding, dilation,
):  # fmt: skip
    torch._check(x.dim() == 4, lambda: f"csr_conv2d_norm_train: Expected x [N, C, H, W], got {x.dim()}-D")
    size = x.shape[0], crow_indices.shape[0] - 1, *output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    z = empty_images(x, size)
    return empty_images(x, size), z, _per_channel(z), _per_channel(z)


@_register("grasp_sparse::csr_conv2d_norm_backward")
def _(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, z, y, norm_weight, norm_bias, mean, var, eps, relu,
    kernel_size, stride, padding, dilation, input_grad=True,
):  # fmt: skip
    torch._check(g.shape == z.shape, lambda: f"csr_conv2d_norm_backward: Expected g {tuple(z.shape)}, got {tuple(g.shape)}")
    dx = empty_images(z, x.shape) if input_grad else x.new_empty(0)
    residual = x.new_empty(0) if y is None else empty_images(z, z.shape)
    dvalues = x.new_empty(1, col_indices.shape[0], dtype=compute_dtype(x.dtype))
    return dx, dvalues, _per_channel(z), residual, _per_channel(z), _per_channel(z)


@_register("grasp_sparse::max_pool2d")
def _(x, kernel_size, stride, padding, dilation, ceil_mode):
    torch._check(x.dim() == 4, lambda: f"max_pool2d: Expected x [N, C, H, W], got {x.dim()}-D")
    y = empty_images(x, (*x.shape[:2], *pooled_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)))
    return y, torch.empty_like(y, dtype=torch.uint8)


@_register("grasp_sparse::max_pool2d_backward")
def _(g, places, input_size, kernel_size, stride, padding, dilation, ceil_mode):
    torch._check(g.shape == places.shape, lambda: f"max_pool2d_backward: Expected g {tuple(places.shape)}, got {tuple(g.shape)}")
    return empty_images(places, (*g.shape[:2], *input_size), g.dtype)


for _name in (*UPDATE_SCHEMAS, "batch_norm_follow_"):
    _register(f"grasp_sparse::{_name}", lambda *_: None)
