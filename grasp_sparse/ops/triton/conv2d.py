"""The convolutional family of blocks on Triton's kernels, with the arguments of the operations.

Kernels read and write ``[N, H, W, C]``, which is channels_last as it lies; other layouts are converted on the way in and out.
A 1 x 1 window that moves by one pixel is a linear layer on pixels, and runs as such.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_sparse.ops.layout import empty_images
from grasp_sparse.ops.triton.launch import Images, Lists, product, regrouped, sampled
from grasp_sparse.ops.triton.linear import check_indices, contiguous_like, written_back
from grasp_sparse.ops.triton.window import window


def bsr_conv2d_fprop(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, out_channels,
    kernel_size, stride, padding, dilation, relu=False,
):  # fmt: skip
    of = window(kernel_size, stride, padding, dilation)
    indices = crow_indices, col_indices, ccol_indices, row_indices, permutation
    check_indices(indices, out_channels, x.shape[1], values.shape[1:], of.taps)
    grid = of.output_size(x.shape[2:])
    out = _pixels_last(empty_images(x, (x.shape[0], out_channels, *grid)))
    y, pixels = contiguous_like(out), _pixels_last(x).contiguous()
    lists = Lists(crow_indices, col_indices, None)
    if of.is_product:
        product(pixels.flatten(0, 2), values, lists, bias, y.flatten(0, 2), _precision(x), relu=relu)
    else:
        images = Images(of, tuple(x.shape[2:]), grid, grid)
        product(pixels, values, lists, bias, y, _precision(x), relu=relu, images=images)
    return _channels_second(written_back(y, out))


def bsr_conv2d_dgrad(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, in_channels, input_size,
    kernel_size, stride, padding, dilation,
):  # fmt: skip
    of = window(kernel_size, stride, padding, dilation)
    indices = crow_indices, col_indices, ccol_indices, row_indices, permutation
    check_indices(indices, g.shape[1], in_channels, values.shape[1:], of.taps)
    size = tuple(int(i) for i in input_size)
    out = _pixels_last(empty_images(g, (g.shape[0], in_channels, *size)))
    dx, pixels = contiguous_like(out), _pixels_last(g).contiguous()
    if of.is_product:
        lists = Lists(ccol_indices, row_indices, permutation)
        product(pixels.flatten(0, 2), values, lists, None, dx.flatten(0, 2), _precision(g), transposed=True)
    else:
        lists = regrouped(ccol_indices, row_indices, permutation, crow_indices.shape[0] - 1, of)
        images = Images(of, tuple(g.shape[2:]), of.phase_size(size), size)
        product(pixels, values, lists, None, dx, _precision(g), transposed=True, images=images)
    return _channels_second(written_back(dx, out))


def bsr_conv2d_wgrad(
    crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, block_size, kernel_size, stride, padding, dilation
):
    of = window(kernel_size, stride, padding, dilation)
    indices = crow_indices, col_indices, ccol_indices, row_indices, permutation
    check_indices(indices, g.shape[1], x.shape[1], block_size, of.taps)
    grads, pixels = _pixels_last(g).contiguous(), _pixels_last(x).contiguous()
    if of.is_product:
        grads, pixels, images = grads.flatten(0, 2), pixels.flatten(0, 2), None
    else:
        images = Images(of, tuple(x.shape[2:]), tuple(g.shape[2:]), tuple(g.shape[2:]))
    return sampled(grads, pixels, crow_indices, col_indices, tuple(block_size), _precision(x), images)


def _precision(x: Tensor) -> str:
    """What tl.dot does with float32: TF32 where torch's own convolutions may."""
    return "tf32" if x.dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _pixels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_second(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
