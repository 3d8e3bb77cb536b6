"""Compressed sparse rows (CSR) of a weight, and the transposed list (CSC) that the backward pass walks.

A convolution weight ``[out, in, kh, kw]`` is stored as the matrix ``[out, in * kh * kw]``.

Worked example, the mask ::

    1 0 1        crow_indices  0 2 3      row r holds values[crow[r] : crow[r+1]]
    0 1 0        col_indices   0 2 1      column of each value
                 ccol_indices  0 1 2 3    column c holds the transposed list's ccol[c] : ccol[c+1]
                 row_indices   0 1 0      row of each entry of the transposed list
                 permutation   0 2 1      its place in values: values_t = values[permutation]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1


class CsrIndices(NamedTuple):
    """The places of the kept weights of one ``[rows, cols]`` matrix, all int32, by row and by column."""

    crow_indices: Tensor  # [rows + 1]
    col_indices: Tensor  # [nnz]
    ccol_indices: Tensor  # [cols + 1]
    row_indices: Tensor  # [nnz]
    permutation: Tensor  # [nnz]

    @property
    def nnz(self) -> int:
        return self.col_indices.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.crow_indices.shape[0] - 1, self.ccol_indices.shape[0] - 1


def csr_from_mask(mask: Tensor) -> CsrIndices:
    """Indices of the True entries of a bool matrix ``[rows, cols]``, in row-major order.

    Raises:
        ValueError: ``mask`` is not a 2-D bool tensor, or has more entries than int32 can number.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"Expected a 2-D bool mask, got {mask.dim()}-D {mask.dtype}; reshape it to [rows, cols].")
    _check_size(*mask.shape)
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    crow[1:] = mask.sum(dim=1, dtype=torch.int32).cumsum(0)  # int32: twelve times faster than the default int64
    rows, cols = mask.nonzero(as_tuple=True)
    return _with_transpose(crow, rows, cols.to(torch.int32), mask.shape[1])


def csr_from_indices(crow_indices: Tensor, col_indices: Tensor, rows: int, cols: int) -> CsrIndices:
    """The same from stored ``crow_indices [rows + 1]`` and ``col_indices [nnz]``, checked so that no kernel can be led
    out of bounds by a corrupt or hostile checkpoint.

    Raises:
        ValueError: wrong type, length or order, or a column outside ``[0, cols)``, or a place listed twice.
    """
    _check_size(rows, cols)
    for name, index in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"Expected {name} to be 1-D int32 or int64, got {index.dim()}-D {index.dtype}.")
    if crow_indices.shape[0] != rows + 1:
        raise ValueError(f"Expected crow_indices of length {rows + 1} for {rows} rows, got {crow_indices.shape[0]}.")
    nnz = col_indices.shape[0]
    if nnz > rows * cols:  # before anything is copied: a few bytes can be expanded to any length
        raise ValueError(f"Expected at most {rows * cols} col_indices, one for each place, got {nnz}; the stored structure is corrupt.")
    crow, col = crow_indices.long(), col_indices.long()
    per_row = crow.diff()
    if int(crow[0]) != 0 or int(crow[-1]) != nnz or bool((per_row < 0).any()):
        raise ValueError(f"Expected crow_indices to rise from 0 to nnz = {nnz}; the stored structure is corrupt.")
    if nnz and (int(col.min()) < 0 or int(col.max()) >= cols):
        raise ValueError(f"Expected col_indices in [0, {cols}), got {int(col.min())} … {int(col.max())}; the stored structure is corrupt.")
    row = torch.repeat_interleave(torch.arange(rows, device=col.device), per_row)
    if bool(((row * cols + col).diff() <= 0).any()):
        raise ValueError("Expected col_indices to rise within every row, each place once; the stored structure is corrupt.")
    return _with_transpose(crow.to(torch.int32), row, col.to(torch.int32), cols)


def is_consistent(indices: CsrIndices) -> bool:
    """Whether both orders list the same places, each once. What others write into indices, averages say, does away with that."""
    crow, col, ccol, row, permutation = indices
    (rows, cols), nnz = indices.shape, indices.nnz
    if not row.shape == permutation.shape == col.shape:
        return False
    for pointers in (crow, ccol):
        if int(pointers[0]) != 0 or int(pointers[-1]) != nnz or bool((pointers.diff() < 0).any()):
            return False
    if nnz == 0:
        return True
    for index, size in ((col, cols), (row, rows), (permutation, nnz)):
        if int(index.min()) < 0 or int(index.max()) >= size:
            return False
    row_of, col_of = (_repeated(pointers, nnz) for pointers in (crow, ccol))
    rises = bool(((col_of * rows + row).diff() > 0).all())
    return rises and bool((row_of[permutation] == row).all()) and bool((col[permutation] == col_of).all())


def gather_values(weight: Tensor, indices: CsrIndices) -> Tensor:
    """The kept entries of a dense weight whose first dimension is rows: ``[1, nnz]``, in CSR order."""
    return weight.reshape(-1)[_flat_places(indices)].unsqueeze(0)


def scatter_values(values: Tensor, indices: CsrIndices, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The dense weight of ``shape`` with ``values [1, nnz]`` in their places and exact zeros elsewhere."""
    rows, cols = indices.shape
    dense = values.new_zeros(rows * cols)
    dense[_flat_places(indices)] = values.reshape(-1)
    return dense.reshape(shape)


def mask_from_csr(indices: CsrIndices, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The bool mask of ``shape`` that :func:`csr_from_mask` was given."""
    return scatter_values(torch.ones_like(indices.col_indices, dtype=torch.bool), indices, shape)


def _flat_places(indices: CsrIndices) -> Tensor:
    return _repeated(indices.crow_indices, indices.nnz) * indices.shape[1] + indices.col_indices


def _repeated(pointers: Tensor, nnz: int) -> Tensor:
    """[nnz] Which row, or column, each entry is in; int64."""
    numbers = torch.arange(pointers.shape[0] - 1, device=pointers.device)
    return torch.repeat_interleave(numbers, pointers.diff().long(), output_size=nnz)


def _with_transpose(crow: Tensor, row: Tensor, col: Tensor, cols: int) -> CsrIndices:
    permutation = torch.argsort(col, stable=True)  # stable: rows rise within a column
    ccol = torch.zeros(cols + 1, dtype=torch.int32, device=col.device)
    ccol[1:] = torch.bincount(col, minlength=cols).cumsum(0)
    return CsrIndices(crow, col, ccol, row[permutation].to(torch.int32), permutation.to(torch.int32))


def _check_size(rows: int, cols: int) -> None:
    if rows * cols > _INT32_MAX:
        raise ValueError(f"Expected a weight of at most {_INT32_MAX} entries (int32 indices), got {rows} x {cols}; leave this layer dense.")
