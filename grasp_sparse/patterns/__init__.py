"""Patterns: which masks are allowed. One file each.

A pattern divides a weight into groups that are kept or pruned together and says what a group's score is. Who keeps how
many groups is decided by allocation.py, the same for every pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from grasp_sparse.patterns.selection import top_k_mask
from grasp_sparse.patterns.unstructured import Unstructured

__all__ = ["PATTERNS", "Pattern", "Unstructured", "get_pattern", "top_k_mask"]


class Pattern(Protocol):
    """What allocation and mask-making ask of a pattern."""

    name: str

    def group_size(self, shape: Sequence[int]) -> int:
        """Weights in one group of a weight of this shape; ValueError when the shape cannot be divided."""

    def pool(self, scores: Tensor) -> Tensor:
        """Scores of a weight [weight shape] -> one score per group [groups]."""

    def expand(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Which groups are kept [groups] -> mask [weight shape]; `scores` as given to `pool`."""


PATTERNS: dict[str, Pattern] = {"unstructured": Unstructured()}


def get_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern of that name, or an object that is one; ValueError for an unknown name."""
    if not isinstance(pattern, str):
        return pattern
    if pattern not in PATTERNS:
        raise ValueError(f"Expected pattern to be one of {', '.join(PATTERNS)}, got {pattern!r}")
    return PATTERNS[pattern]
