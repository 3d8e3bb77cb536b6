"""The linear family of blocks on Triton's kernels, with the arguments of the operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_sparse.ops.layout import empty_rows
from grasp_sparse.ops.triton.launch import Lists, product, sampled


def bsr_spmm(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, bias, x, out_features, relu=False):
    indices = crow_indices, col_indices, ccol_indices, row_indices, permutation
    check_indices(indices, out_features, x.shape[1], values.shape[1:])
    out = empty_rows(x, (x.shape[0], out_features))
    y = contiguous_like(out)
    product(x.contiguous(), values, Lists(crow_indices, col_indices, None), bias, y, precision(x), relu=relu)
    return written_back(y, out)


def bsr_spmm_t(values, crow_indices, col_indices, ccol_indices, row_indices, permutation, g, in_features):
    indices = crow_indices, col_indices, ccol_indices, row_indices, permutation
    check_indices(indices, g.shape[1], in_features, values.shape[1:])
    out = empty_rows(g, (g.shape[0], in_features))
    dx = contiguous_like(out)
    product(g.contiguous(), values, Lists(ccol_indices, row_indices, permutation), None, dx, precision(g), transposed=True)
    return written_back(dx, out)


def bsr_sddmm(crow_indices, col_indices, ccol_indices, row_indices, permutation, g, x, block_size):
    indices = crow_indices, col_indices, ccol_indices, row_indices, permutation
    check_indices(indices, g.shape[1], x.shape[1], block_size)
    return sampled(g.contiguous(), x.contiguous(), crow_indices, col_indices, tuple(block_size), precision(x))


def check_indices(
    indices: Sequence[Tensor], out_channels: int, in_channels: int, block_size: Sequence[int], taps: int = 1
) -> None:
    """A kernel that walked the indices of another weight would leave its tensors.

    Raises:
        ValueError: the indices are not those of a weight of this size, or of different numbers of blocks.
    """
    crow_indices, col_indices, ccol_indices, row_indices, permutation = indices
    expected = math.ceil(out_channels / block_size[0]), math.ceil(in_channels / block_size[1]) * taps
    got = crow_indices.shape[0] - 1, ccol_indices.shape[0] - 1
    if got != expected:
        raise ValueError(
            f"Expected indices of {expected[0]} x {expected[1]} blocks {list(block_size)} for {out_channels} x {in_channels} "
            f"channels and {taps} taps, got {got[0]} x {got[1]}; they are those of another weight."
        )
    blocks, *others = (index.shape[0] for index in (col_indices, row_indices, permutation))
    if others != [blocks, blocks]:
        raise ValueError(
            f"Expected row_indices and permutation of {blocks} entries like col_indices, got {others[0]} and {others[1]}; "
            "give all five of one weight."
        )


def precision(x: Tensor) -> str:
    """What tl.dot does with float32: TF32 where torch's own products may."""
    return "tf32" if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def contiguous_like(out: Tensor) -> Tensor:
    """``out`` itself where a kernel can write it."""
    return out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def written_back(y: Tensor, out: Tensor) -> Tensor:
    return out if y is out else out.copy_(y)
