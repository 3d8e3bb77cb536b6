"""More features than one packed panel holds in cache: they are taken in blocks of channels, each row going on where it stopped."""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, close, dense_matrix
from torch import Tensor

from grasp_sparse.formats import CsrIndices, csr_from_mask

ops = torch.ops.grasp_sparse
WIDE, NARROW, BATCH = 3000, 24, 200


def _mask(kind: str) -> Tensor:
    mask = torch.rand(NARROW, WIDE) < 0.05
    if kind.startswith("few entries"):  # so that most blocks have none
        mask = torch.rand(NARROW, WIDE) < 0.0007
    elif kind == "ends only":
        mask[:, 100:-100] = False
    elif kind == "one block a row":
        for row in range(NARROW):
            first = row % 3 * 1000
            mask[row, :first] = mask[row, first + 1000 :] = False
    mask[::5] = False
    if kind != "few entries in any row":  # of too few on average there are no blocks
        mask[3] = True
    return mask


def _arguments(mask: Tensor) -> tuple[Tensor, CsrIndices, Tensor, Tensor, Tensor]:
    values = torch.randn(1, int(mask.sum()))
    return values, csr_from_mask(mask), torch.randn(mask.shape[0]), torch.randn(BATCH, mask.shape[1]), torch.randn(BATCH, mask.shape[0])


@pytest.mark.parametrize("turned", [False, True], ids=["wide input", "wide output"])
@pytest.mark.parametrize("kind", ["even", "few entries in most rows", "few entries in any row", "ends only", "one block a row"])
def test_equals_matrix_product(kind, turned):
    mask = _mask(kind).t().contiguous() if turned else _mask(kind)
    values, indices, bias, x, g = _arguments(mask)
    weight = dense_matrix(values.double(), mask)
    x64, g64 = x.double(), g.double()
    close(ops.csr_spmm(values, *indices, bias, x), x64 @ weight.t() + bias.double())
    close(ops.csr_spmm_t(values, *indices, g), g64 @ weight)
    dvalues = (g64.t() @ x64)[mask].unsqueeze(0)
    close(ops.csr_sddmm(*indices, g, x), dvalues)
    for got, wanted in zip(ops.csr_spmm_backward(values, *indices, g, x), (g64 @ weight, dvalues, g64.sum(0)), strict=True):
        close(got, wanted)


@pytest.mark.skipif(not COMPILED, reason="the reference does not walk in blocks")
@pytest.mark.parametrize("place", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("wrong", [-1, WIDE, 2**30])
def test_corrupt_column_in_any_block_is_refused(place, wrong):
    values, indices, bias, x, g = _arguments(_mask("even"))
    col = indices.col_indices.clone()
    row = slice(indices.crow_indices[1], indices.crow_indices[2])
    col[row][place] = wrong
    indices = indices._replace(col_indices=col)
    for call in (lambda: ops.csr_spmm(values, *indices, bias, x), lambda: ops.csr_sddmm(*indices, g, x)):
        with pytest.raises(RuntimeError, match="corrupt"):
            call()


@pytest.mark.skipif(not COMPILED, reason="the reference does not walk in blocks")
@pytest.mark.parametrize("feature_major", [False, True])
def test_corrupt_column_just_past_a_last_block_that_is_smaller_is_refused(feature_major):
    """3001 columns are blocks of 1001, 1001 and 999; a batch of whole vectors leaves no rest that would be walked in one block."""
    mask = torch.rand(NARROW, 3001) < 0.05
    mask[:, -1] = True
    values, indices, bias, x, g = _arguments(mask)
    x, g = x[:192], g[:192]
    x = x.t().contiguous().t() if feature_major else x
    col = indices.col_indices.clone()
    assert col[-1] == 3000
    col[-1] = 3001
    for call in (
        lambda: ops.csr_spmm(values, *indices._replace(col_indices=col), bias, x),
        lambda: ops.csr_sddmm(*indices._replace(col_indices=col), g, x),
        lambda: ops.csr_spmm_backward(values, *indices._replace(col_indices=col), g, x),
    ):
        with pytest.raises(RuntimeError, match="corrupt"):
            call()


@pytest.mark.skipif(not COMPILED, reason="the reference takes columns in any order")
def test_columns_that_fall_within_a_row_are_refused():
    values, indices, bias, x, _ = _arguments(_mask("even"))
    col = indices.col_indices.clone()
    row = slice(indices.crow_indices[1], indices.crow_indices[2])
    col[row] = col[row].flip(0)
    with pytest.raises(RuntimeError, match="corrupt"):
        ops.csr_spmm(values, *indices._replace(col_indices=col), bias, x)


@pytest.mark.parametrize("batch", [64, 512, 1040, 2048])
def test_sums_are_the_same_bits_for_any_number_of_threads(batch):
    """Few weights beside many wide rows: panels, one a task, are dealt to groups that sum in buffers of their own."""
    mask = torch.rand(48, 1024) < 0.01
    values, indices = torch.randn(1, int(mask.sum())), csr_from_mask(mask)
    x, g = torch.randn(batch, 1024), torch.randn(batch, 48)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.csr_spmm_backward(values, *indices, g, x))
    close(results[0][1], (g.double().t() @ x.double())[mask].unsqueeze(0))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
