"""Blocks: the worked example, round trips on ragged shapes and convolutions, counts, and masks that are not of whole blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grasp_sparse.formats import (
    CsrIndices,
    block_extents,
    block_grid,
    bsr_from_mask,
    count_inside,
    csr_from_mask,
    from_blocks,
    gather_blocks,
    mask_from_bsr,
    scatter_blocks,
    storage_of,
    stored_block_size,
    to_blocks,
)

CASES = {
    "whole": ((8, 12), (4, 3)),
    "ragged outputs": ((7, 12), (4, 3)),
    "ragged inputs": ((8, 11), (4, 3)),
    "ragged both": ((5, 7), (2, 3)),
    "one block larger than the weight": ((3, 2), (16, 16)),
    "single weights": ((3, 5), (1, 1)),
    "vectors": ((6, 5), (4, 1)),
    "conv": ((4, 6, 3, 3), (2, 3)),
    "conv ragged": ((5, 7, 2, 3), (2, 3)),
    "conv 1x1": ((5, 4, 1, 1), (2, 4)),
    "no outputs": ((0, 4), (2, 2)),
    "no inputs": ((4, 0, 3, 3), (2, 2)),
}
ALL = pytest.mark.parametrize("shape, block", CASES.values(), ids=CASES)


def random_grid(shape, block, density: float = 0.4) -> tuple[torch.Tensor, CsrIndices]:
    """Which blocks are kept [block rows, block columns], and their indices."""
    kept = torch.rand(block_grid(shape, block)) < density
    return kept, csr_from_mask(kept)


def cells(shape, block):
    """(block row, block column, row in it, column in it, place in the weight) of every weight, by the definition."""
    out, channels, *kernel = shape
    chunks = math.ceil(channels / block[1])
    for tap, place in enumerate(itertools.product(*map(range, kernel))):
        for o, i in itertools.product(range(out), range(channels)):
            yield o // block[0], tap * chunks + i // block[1], o % block[0], i % block[1], (o, i, *place)


def test_worked_example():
    weight = torch.tensor([[1, 1, 0, 0, 2], [1, 1, 0, 0, 2], [0, 0, 3, 3, 0], [0, 0, 3, 3, 0]])
    indices = bsr_from_mask(weight != 0, (2, 2))
    assert block_grid(weight.shape, (2, 2)) == indices.shape == (2, 3)
    assert indices.crow_indices.tolist() == [0, 2, 3]
    assert indices.col_indices.tolist() == [0, 2, 1]
    values = gather_blocks(weight, indices, (2, 2))
    assert values.tolist() == [[[1, 1], [1, 1]], [[2, 0], [2, 0]], [[3, 3], [3, 3]]]
    assert torch.equal(scatter_blocks(values, indices, weight.shape), weight)


@ALL
def test_every_weight_is_where_the_definition_says(shape, block):
    weight = torch.randn(shape)
    blocks = to_blocks(weight, block)
    assert blocks.shape == (*block_grid(shape, block), *block)
    expected = torch.zeros_like(blocks)
    for row, column, y, x, place in cells(shape, block):
        expected[row, column, y, x] = weight[place]
    assert torch.equal(blocks, expected)
    assert torch.equal(from_blocks(blocks, shape), weight)


@ALL
def test_round_trips(shape, block):
    weight = torch.randn(shape)
    kept, indices = random_grid(shape, block)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, column, _, _, place in cells(shape, block):
        mask[place] = kept[row, column]
    assert torch.equal(mask_from_bsr(indices, shape, block), mask)
    again = bsr_from_mask(mask, block)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again, indices, strict=True))
    values = gather_blocks(weight, indices, block)
    assert values.shape == (indices.nnz, *block)
    assert torch.equal(scatter_blocks(values, indices, shape), torch.where(mask, weight, 0))
    # What a block holds past the weight is lost on the way there, and zero on the way back.
    beyond = gather_blocks(torch.ones(shape), indices, block) == 0
    assert torch.equal(scatter_blocks(values + beyond, indices, shape), scatter_blocks(values, indices, shape))
    assert bool((values[beyond] == 0).all())
    assert count_inside(indices, shape, block) == int(mask.sum())


@ALL
def test_extents_are_what_lies_inside(shape, block):
    heights, widths = block_extents(shape, block)
    assert torch.equal(torch.outer(heights, widths), to_blocks(torch.ones(shape), block).sum((2, 3)).long())


def test_layouts_of_the_weight_do_not_matter():
    weight = torch.randn(4, 6, 3, 3)
    assert torch.equal(to_blocks(weight.to(memory_format=torch.channels_last), (2, 4)), to_blocks(weight, (2, 4)))


def test_scatter_is_differentiable_and_gives_nothing_past_the_weight():
    _, indices = random_grid((5, 7), (2, 3), 1.0)
    values = torch.randn(indices.nnz, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: scatter_blocks(v, indices, (5, 7)), values)
    (gradient,) = torch.autograd.grad(scatter_blocks(values, indices, (5, 7)).sum(), values)
    assert torch.equal(gradient, gather_blocks(torch.ones(5, 7, dtype=torch.float64), indices, (2, 3)))


@pytest.mark.parametrize("place", [(0, 0), (1, 3), (4, 6), (4, 0)], ids=str)
def test_a_part_of_a_block_is_refused(place):
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[place] = True  # of the ragged corner [1, 1] it is all: that one is whole
    if place == (4, 6):
        assert bsr_from_mask(mask, (2, 3)).nnz == 1
        return
    with pytest.raises(ValueError, match=r"whole \[2, 3\] blocks, got one that keeps parts.*store the weight unstructured"):
        bsr_from_mask(mask, (2, 3))


@pytest.mark.parametrize("mask", [torch.ones(4, 4), torch.ones(4).bool()], ids=["float", "1-D"])
def test_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="Expected a bool mask of the shape of a weight"):
        bsr_from_mask(mask, (2, 2))


class TestStorage:
    @pytest.mark.parametrize("block", [None, (2, 3), (1, 1)], ids=str)
    @pytest.mark.parametrize("shape", [(5, 7), (5, 7, 2, 3)], ids=str)
    def test_both_storages_keep_their_word(self, shape, block):
        storage = storage_of(block)
        _, indices = random_grid(shape, block or (1, 1))
        mask = mask_from_bsr(indices, shape, block or (1, 1))
        indices, weight = storage.from_mask(mask), torch.randn(shape)
        values = storage.gather(weight, indices)
        assert indices.shape == storage.grid(shape)
        assert values.shape == storage.values_shape(indices.nnz)
        assert stored_block_size(values) == storage.block_size == block
        assert torch.equal(storage.scatter(values, indices, shape), weight * mask)
        assert torch.equal(storage.mask(indices, shape), mask)
        assert storage.nnz(indices, shape) == int(mask.sum())

    @pytest.mark.parametrize("block", [(0, 2), (2,), (2, 2.0), (2, -1), (1, 2, 3)], ids=str)
    def test_block_sizes_that_are_none(self, block):
        with pytest.raises(ValueError, match="two positive integers"):
            storage_of(block)


def test_blocks_far_beyond_the_weight_are_refused():
    assert block_grid((10, 4096), (256, 256)) == (1, 16)
    with pytest.raises(ValueError, match="Expected blocks about the size"):
        block_grid((10, 10), (1 << 20, 1 << 20))
