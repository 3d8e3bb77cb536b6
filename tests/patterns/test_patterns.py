"""A pattern pools scores into groups and expands chosen groups into a mask; the choice itself is exact and deterministic."""

from __future__ import annotations

import pytest
import torch

from grasp_sparse.patterns import get_pattern, top_k_mask


def test_unstructured_groups_are_single_weights_in_row_major_order():
    pattern = get_pattern("unstructured")
    scores = torch.arange(6.0).view(2, 3)
    assert pattern.group_size(scores.shape) == 1
    assert pattern.pool(scores).tolist() == [0, 1, 2, 3, 4, 5]
    kept = torch.tensor([True, False, False, False, True, True])
    assert pattern.expand(kept, scores).tolist() == [[True, False, False], [False, True, True]]


def test_an_unknown_pattern_is_refused_and_an_object_is_taken():
    with pytest.raises(ValueError, match="unstructured"):
        get_pattern("zebra")
    pattern = get_pattern("unstructured")
    assert get_pattern(pattern) is pattern


@pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 7])
def test_top_k_is_the_stable_sort(k):
    scores = torch.tensor([0.0, 2.0, -0.0, 2.0, -1.0, 0.0, 2.0])
    expected = torch.zeros(7, dtype=torch.bool)
    expected[scores.argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(top_k_mask(scores, k), expected)
