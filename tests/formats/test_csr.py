"""Index arithmetic: the worked example, round trips at the edges, and every kind of corruption refused by name."""

from __future__ import annotations

import pytest
import torch

from grasp_sparse.formats import csr_from_indices, csr_from_mask, gather_values, mask_from_csr, scatter_values

SHAPES = [(3, 3), (1, 1), (1, 7), (7, 1), (5, 0), (0, 5), (17, 33)]


def test_worked_example():
    indices = csr_from_mask(torch.tensor([[1, 0, 1], [0, 1, 0]]).bool())
    assert [index.tolist() for index in indices] == [[0, 2, 3], [0, 2, 1], [0, 1, 2, 3], [0, 1, 0], [0, 2, 1]]
    assert all(index.dtype == torch.int32 for index in indices)
    assert (indices.nnz, indices.shape) == (3, (2, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_round_trip(shape, density):
    mask = torch.rand(shape) < density
    weight = torch.randn(shape)
    indices = csr_from_mask(mask)
    values = gather_values(weight, indices)
    assert torch.equal(values[0], weight[mask])
    assert torch.equal(scatter_values(values, indices, shape), torch.where(mask, weight, 0))
    assert torch.equal(mask_from_csr(indices, shape), mask)
    rebuilt = csr_from_indices(indices.crow_indices, indices.col_indices.long(), *shape)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(indices, rebuilt, strict=True))


def test_transposed_list_is_that_of_the_transposed_matrix():
    mask = torch.rand(9, 14) < 0.4
    mask[3] = mask[:, 5] = False
    indices, transposed = csr_from_mask(mask), csr_from_mask(mask.t())
    assert torch.equal(indices.ccol_indices, transposed.crow_indices)
    assert torch.equal(indices.row_indices, transposed.col_indices)
    weight = torch.randn(9, 14)
    assert torch.equal(gather_values(weight, indices)[0, indices.permutation.long()], gather_values(weight.t(), transposed)[0])


def test_gather_reads_the_logical_order_of_a_channels_last_weight():
    weight = torch.randn(4, 3, 2, 2)
    indices = csr_from_mask(torch.rand(4, 12) < 0.5)
    assert torch.equal(gather_values(weight.to(memory_format=torch.channels_last), indices), gather_values(weight, indices))


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(6).bool(), torch.ones(1, 2, 3).bool()], ids=["float", "1-D", "3-D"])
def test_mask_must_be_a_bool_matrix(mask):
    with pytest.raises(ValueError, match="2-D bool mask"):
        csr_from_mask(mask)


CORRUPT = {  # of the matrix 1 0 1 / 0 1 0
    "first not 0": ([1, 2, 3], [0, 2, 1], "rise from 0"),
    "last not nnz": ([0, 2, 4], [0, 2, 1], "rise from 0"),
    "last negative": ([0, 2, -3], [0, 2, 1], "rise from 0"),
    "falls": ([0, 4, 3], [0, 2, 1], "rise from 0"),
    "too few rows": ([0, 3], [0, 1, 2], "length 3"),
    "too many rows": ([0, 1, 2, 3], [0, 1, 2], "length 3"),
    "column too large": ([0, 2, 3], [0, 3, 1], r"in \[0, 3\)"),
    "column negative": ([0, 2, 3], [-1, 2, 1], r"in \[0, 3\)"),
    "unsorted": ([0, 2, 3], [2, 0, 1], "rise within"),
    "twice": ([0, 2, 3], [2, 2, 1], "rise within"),
}


@pytest.mark.parametrize("crow, col, message", CORRUPT.values(), ids=CORRUPT)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_corrupt_indices_are_refused(crow, col, message, dtype):
    with pytest.raises(ValueError, match=message):
        csr_from_indices(torch.tensor(crow, dtype=dtype), torch.tensor(col, dtype=dtype), 2, 3)


def test_more_indices_than_places_are_refused_before_they_take_memory():
    repeated = torch.zeros(1, dtype=torch.int32).expand(10**12)
    with pytest.raises(ValueError, match="Expected at most 6 col_indices, one for each place, got 1000000000000"):
        csr_from_indices(torch.tensor([0, 2, 3]), repeated, 2, 3)


def test_wrong_type_and_rank_are_refused():
    crow, col = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match="crow_indices to be 1-D int32 or int64"):
        csr_from_indices(crow.float(), col, 2, 3)
    with pytest.raises(ValueError, match="col_indices to be 1-D int32 or int64"):
        csr_from_indices(crow, col.unsqueeze(0), 2, 3)


def test_weights_beyond_int32_are_refused():
    with pytest.raises(ValueError, match="leave this layer dense"):
        csr_from_indices(torch.zeros(2**20 + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 2**20, 2**11)
    with pytest.raises(ValueError, match="leave this layer dense"):
        csr_from_mask(torch.zeros(1, 1, dtype=torch.bool).expand(2**20, 2**11))
