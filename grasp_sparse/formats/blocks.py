"""Block compressed sparse rows (BSR) of a weight: whole blocks of ``bh`` outputs by ``bw`` inputs are kept or not.

A convolution weight ``[out, in, kh, kw]`` is cut tap by tap: a block is one tap and ``bw`` neighbouring input channels, and the
columns of the grid go through all channels of the first tap, then of the second, and so on. Where channels are not a
multiple of the block, the last blocks reach past the weight; what they store there counts for nothing and stays zero.

Worked example, ``[2, 2]`` blocks of a linear weight ``[4, 5]``: a grid of 2 x 3 blocks, the last column of it half outside ::

    1 1 0 0 2
    1 1 0 0 2        crow_indices  0 2 3      block row r holds values[crow[r] : crow[r+1]], each [2, 2]
    0 0 3 3 0        col_indices   0 2 1      the block column of each
    0 0 3 3 0        values[1]     2 0        its second column lies outside
                                   2 0

The indices are those of :class:`~grasp_sparse.formats.CsrIndices`, with blocks in place of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_sparse.formats.csr import CsrIndices, csr_from_mask, gather_values


_MOST_PADDED = 1 << 26  # entries


def block_grid(weight_shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, int]:
    """Block rows and block columns of a weight ``[out, in]`` or ``[out, in, kh, kw]``.

    Raises:
        ValueError: blocks so much larger than the weight that its dense copy, padded to whole blocks, would not fit into memory:
            no mask asks for them, a damaged checkpoint may.
    """
    rows, cols = math.ceil(weight_shape[0] / block_size[0]), math.ceil(weight_shape[1] / block_size[1]) * math.prod(weight_shape[2:])
    if rows * cols * math.prod(block_size) > max(_MOST_PADDED, 8 * math.prod(weight_shape)):
        raise ValueError(f"Expected blocks about the size of a {list(weight_shape)} weight or smaller, got {list(block_size)}.")
    return rows, cols


def block_extents(weight_shape: Sequence[int], block_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Outputs of each block row, inputs of each block column inside the weight: ``[block rows]``, ``[block columns]``."""
    (bh, bw), (out, channels, *kernel) = block_size, weight_shape
    heights, widths = torch.arange(out, 0, -bh).clamp(max=bh), torch.arange(channels, 0, -bw).clamp(max=bw)
    return heights, widths.repeat(math.prod(kernel))


def to_blocks(weight: Tensor, block_size: Sequence[int]) -> Tensor:
    """All blocks of a weight, ``[block rows, block columns, bh, bw]``, zeros where they reach past it."""
    (bh, bw), (rows, _) = block_size, block_grid(weight.shape, block_size)
    by_tap = weight.flatten(2).movedim(1, 2) if weight.dim() > 2 else weight.unsqueeze(1)  # [out, taps, in]
    out, taps, channels = by_tap.shape
    chunks = math.ceil(channels / bw)
    padded = F.pad(by_tap, (0, chunks * bw - channels, 0, 0, 0, rows * bh - out))
    return padded.reshape(rows, bh, taps * chunks, bw).transpose(1, 2)


def from_blocks(blocks: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The weight of which :func:`to_blocks` gave these ``[block rows, block columns, bh, bw]``."""
    rows, cols, bh, bw = blocks.shape
    out, channels, *kernel = weight_shape
    taps = math.prod(kernel)
    by_tap = blocks.transpose(1, 2).reshape(rows * bh, taps, cols // max(1, taps) * bw)[:out, :, :channels]
    return by_tap.movedim(2, 1).reshape(tuple(weight_shape))


def bsr_from_mask(mask: Tensor, block_size: Sequence[int]) -> CsrIndices:
    """The places of the blocks that a bool mask of the weight's shape keeps.

    Raises:
        ValueError: the mask keeps a part of a block, or is not a bool mask of at least two dimensions.
    """
    if mask.dtype != torch.bool or mask.dim() < 2:
        raise ValueError(f"Expected a bool mask of the shape of a weight, got {mask.dim()}-D {mask.dtype}.")
    kept = to_blocks(mask, block_size).flatten(2)
    inside = to_blocks(torch.ones_like(mask), block_size).flatten(2)
    whole = (kept == inside).all(-1)
    if not bool((whole | ~kept.any(-1)).all()):
        raise ValueError(
            f"Expected a mask of whole {list(block_size)} blocks, got one that keeps parts of some; "
            "make it with this block as pattern, or store the weight unstructured."
        )
    return csr_from_mask(whole & inside.any(-1))


def gather_blocks(weight: Tensor, indices: CsrIndices, block_size: Sequence[int]) -> Tensor:
    """The kept blocks of a dense weight: ``[nblocks, bh, bw]``, in the order of ``indices``."""
    return to_blocks(weight, block_size).flatten(0, 1)[_places(indices)]


def scatter_blocks(values: Tensor, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
    """The dense weight with ``values [nblocks, bh, bw]`` in their places and exact zeros elsewhere."""
    rows, cols = indices.shape
    blocks = values.new_zeros(rows * cols, *values.shape[1:])
    blocks[_places(indices)] = values
    return from_blocks(blocks.unflatten(0, (rows, cols)), weight_shape)


def mask_from_bsr(indices: CsrIndices, weight_shape: Sequence[int], block_size: Sequence[int]) -> Tensor:
    """The bool mask of the weight's shape that :func:`bsr_from_mask` was given."""
    kept = torch.ones(indices.nnz, *block_size, dtype=torch.bool, device=indices.col_indices.device)
    return scatter_blocks(kept, indices, weight_shape)


def count_inside(indices: CsrIndices, weight_shape: Sequence[int], block_size: Sequence[int]) -> int:
    """How many of the weight's entries the kept blocks hold; what reaches past the weight is none."""
    if weight_shape[0] % block_size[0] == 0 and weight_shape[1] % block_size[1] == 0:
        return indices.nnz * math.prod(block_size)
    inside = torch.outer(*block_extents(weight_shape, block_size)).flatten()
    return int(inside[_places(indices).cpu()].sum())


def _places(indices: CsrIndices) -> Tensor:
    """Of the kept blocks among all, block row after block row."""
    everywhere = torch.arange(math.prod(indices.shape), device=indices.col_indices.device)
    return gather_values(everywhere, indices)[0]
