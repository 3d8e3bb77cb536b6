"""How a layer stores its weight, single weights (CSR) or whole blocks (BSR), under one set of names.

Nothing but the shape of ``values`` tells the two apart: ``[1, nnz]`` is CSR, ``[nblocks, bh, bw]`` is BSR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from grasp_sparse.formats.blocks import block_grid, bsr_from_mask, count_inside, gather_blocks, mask_from_bsr, scatter_blocks
from grasp_sparse.formats.csr import CsrIndices, csr_from_mask, gather_values, mask_from_csr, scatter_values


class Storage(Protocol):
    """One way to store a weight ``[out, in]`` or ``[out, in, kh, kw]``; entries are what its indices number."""

    block_size: tuple[int, int] | None

    def grid(self, weight_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the matrix of entries: the shape of the indices."""

    def values_shape(self, entries: int) -> tuple[int, ...]:
        """Shape of the values of so many entries."""

    def from_mask(self, mask: Tensor) -> CsrIndices:
        """The places of what a bool mask of the weight's shape keeps; ValueError if it cannot be stored so."""

    def gather(self, weight: Tensor, indices: CsrIndices) -> Tensor:
        """The kept values of a dense weight."""

    def scatter(self, values: Tensor, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
        """The dense weight with exact zeros where nothing is kept; differentiable with respect to ``values``."""

    def mask(self, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
        """The bool mask of the weight's shape that ``from_mask`` was given."""

    def nnz(self, indices: CsrIndices, weight_shape: Sequence[int]) -> int:
        """Kept weights; what lies outside the weight is none."""

    def describe(self, entries: int) -> str:
        """So many entries, in words."""


@dataclass(frozen=True)
class SingleWeights:
    """Entries are single weights, of a convolution those of the matrix ``[out, in * kh * kw]``."""

    block_size: ClassVar[None] = None

    def grid(self, weight_shape: Sequence[int]) -> tuple[int, int]:
        return weight_shape[0], math.prod(weight_shape[1:])

    def values_shape(self, entries: int) -> tuple[int, ...]:
        return 1, entries

    def from_mask(self, mask: Tensor) -> CsrIndices:
        return csr_from_mask(mask.flatten(1))

    def gather(self, weight: Tensor, indices: CsrIndices) -> Tensor:
        return gather_values(weight, indices)

    def scatter(self, values: Tensor, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
        return scatter_values(values, indices, tuple(weight_shape))

    def mask(self, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
        return mask_from_csr(indices, tuple(weight_shape))

    def nnz(self, indices: CsrIndices, weight_shape: Sequence[int]) -> int:
        return indices.nnz

    def describe(self, entries: int) -> str:
        return f"nnz = {entries} weights"


@dataclass(frozen=True)
class WholeBlocks:
    """Entries are blocks of ``block_size`` outputs by inputs; see :mod:`grasp_sparse.formats.blocks`."""

    block_size: tuple[int, int]

    def grid(self, weight_shape: Sequence[int]) -> tuple[int, int]:
        return block_grid(weight_shape, self.block_size)

    def values_shape(self, entries: int) -> tuple[int, ...]:
        return entries, *self.block_size

    def from_mask(self, mask: Tensor) -> CsrIndices:
        return bsr_from_mask(mask, self.block_size)

    def gather(self, weight: Tensor, indices: CsrIndices) -> Tensor:
        return gather_blocks(weight, indices, self.block_size)

    def scatter(self, values: Tensor, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
        return scatter_blocks(values, indices, weight_shape)

    def mask(self, indices: CsrIndices, weight_shape: Sequence[int]) -> Tensor:
        return mask_from_bsr(indices, weight_shape, self.block_size)

    def nnz(self, indices: CsrIndices, weight_shape: Sequence[int]) -> int:
        return count_inside(indices, weight_shape, self.block_size)

    def describe(self, entries: int) -> str:
        return f"{entries} blocks of {self.block_size[0]}x{self.block_size[1]} weights"


def storage_of(block_size: Sequence[int] | None) -> Storage:
    """The storage of blocks of this size, of single weights if None.

    Raises:
        ValueError: not two positive integers.
    """
    if block_size is None:
        return SingleWeights()
    if len(block_size) != 2 or any(type(size) is not int or size < 1 for size in block_size):
        raise ValueError(f"Expected block_size as two positive integers (outputs, inputs), got {block_size}.")
    return WholeBlocks(tuple(block_size))


def stored_block_size(values: Tensor) -> tuple[int, int] | None:
    """The block size that the shape of ``values`` tells: None unless ``[nblocks, bh, bw]``."""
    return tuple(values.shape[1:]) if values.dim() == 3 else None
