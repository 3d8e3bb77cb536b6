"""Keeping exactly the k best of a list, deterministically."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mask [n] of the `k` largest of `scores` [n]; among equal scores the lower index wins.

    >>> top_k_mask(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    n = scores.numel()
    if k <= 0 or k >= n:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    # A selection is several times faster than a sort, and torch.topk leaves open which of equal scores it returns.
    threshold = kth_smallest(scores, n - k + 1)
    kept = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    kept[ties[: k - int(kept.count_nonzero())]] = True
    return kept


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The `k`-th smallest, from 1, of `scores` [n]; by a sort where torch has no selection that it calls deterministic."""
    if scores.is_cuda and torch.are_deterministic_algorithms_enabled():
        return scores.sort().values[k - 1]
    return scores.kthvalue(k).values
