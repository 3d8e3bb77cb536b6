"""Masks of scores that lie on a device are those of the same scores on the CPU."""

from __future__ import annotations

import pytest
import torch

from grasp_sparse import allocation
from grasp_sparse.pruning import make_masks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("price", [49.0, 9.0, 1.0])
def test_ties_at_a_price_that_no_product_undoes_end(price, monkeypatch):
    """49 times the reciprocal of 49 is not 1: a pivot has to be divided as the scores are, or nothing is ever decided."""
    monkeypatch.setattr(allocation, "_SORTED_AT_ONCE", 10)
    scores, costs = {"a": torch.full((64, 64), price), "b": torch.ones(1, 1)}, {"a": price, "b": 1.0}
    on_cpu = make_masks(scores, 0.5, budget="flops", costs=costs)
    on_device = make_masks({name: values.cuda() for name, values in scores.items()}, 0.5, budget="flops", costs=costs)
    assert all(torch.equal(on_device[name].cpu(), on_cpu[name]) for name in scores)
