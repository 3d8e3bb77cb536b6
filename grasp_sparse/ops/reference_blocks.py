"""The definition of the operations on weights of whole blocks, in plain torch; see reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_sparse.formats import CsrIndices, gather_blocks, scatter_blocks
from grasp_sparse.ops import dense
from grasp_sparse.ops.reference import without_autocast
from grasp_sparse.ops.schema import BLOCK_SCHEMAS


def bsr_spmm(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, out_features, relu=False):
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    return dense.linear(scatter_blocks(values, indices, (out_features, x.shape[1])), bias, x, relu)


def bsr_spmm_t(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, in_features):
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    return dense.linear_t(scatter_blocks(values, indices, (g.shape[1], in_features)), g)


def bsr_sddmm(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, block_size):
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    return gather_blocks(dense.computed(g).t() @ dense.computed(x), indices, block_size)


def bsr_conv2d_fprop(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, out_channels,
    kernel_size, stride, padding, dilation, relu=False,
):  # fmt: skip
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    weight = _filters(values, indices, out_channels, x.shape[1], kernel_size)
    return dense.fprop(weight, bias, x, stride, padding, dilation, relu)


def bsr_conv2d_dgrad(
    values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, in_channels, input_size,
    kernel_size, stride, padding, dilation,
):  # fmt: skip
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    return dense.dgrad(_filters(values, indices, g.shape[1], in_channels, kernel_size), g, input_size, stride, padding, dilation)


def bsr_conv2d_wgrad(
    crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, block_size, kernel_size, stride, padding, dilation
):
    indices = CsrIndices(crow_indices, col_indices, ccol_indices, row_indices, permutation)
    return gather_blocks(dense.wgrad(g, x, kernel_size, stride, padding, dilation), indices, block_size)


def _filters(values: Tensor, indices: CsrIndices, out_channels: int, in_channels: int, kernel_size) -> Tensor:
    return scatter_blocks(values, indices, (out_channels, in_channels, *kernel_size))


_library = torch.library.Library("grasp_sparse", "IMPL")
for _name in BLOCK_SCHEMAS:
    _library.impl(_name, without_autocast(globals()[_name]), "CompositeExplicitAutograd")
