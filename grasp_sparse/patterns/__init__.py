"""Patterns: which masks are allowed. One file each.

A pattern divides a weight into groups that are kept or pruned together. The score of a group is the SUM of the scores of
its weights. For GraSP that is exact to first order: removing the weights Q changes ‖g‖² by about −2·Σ_Q θ_q·(Hg)_q, so
signed scores add up, where an average or a norm would not. Who keeps how many groups is decided by allocation.py, the same for
every pattern. `nm` leaves nothing to decide: it gives every layer the same density.

A pattern is written as an object or as what its `name` says:

====================  ========================================================================
``unstructured``      single weights
``block(bh, bw)``     bh outputs by bw inputs, of a convolution bw channels of one tap; stored and computed as whole blocks
``vector(v)``         v consecutive outputs of one input, of a convolution of one channel of one tap
``nm(n, m)``          n of every m consecutive inputs of one output, of a convolution channels of one tap
``channel``           whole output channels; ``channel(in)`` whole input channels
====================  ========================================================================

Outputs or inputs that the size does not divide end in smaller groups, which cost what they hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from grasp_sparse.patterns.block import Block, Vector
from grasp_sparse.patterns.channel import Channel
from grasp_sparse.patterns.nm import NM
from grasp_sparse.patterns.selection import top_k_mask
from grasp_sparse.patterns.unstructured import Unstructured

__all__ = [
    "NM",
    "PATTERNS",
    "USAGE",
    "Block",
    "Channel",
    "GroupPattern",
    "Pattern",
    "Unstructured",
    "Vector",
    "get_pattern",
    "top_k_mask",
]


class Pattern(Protocol):
    """What every pattern says of itself."""

    name: str  # `get_pattern(name)` is this pattern
    block_size: tuple[int, int] | None  # layers store whole blocks of this size; None: single weights
    density: float | None  # of every layer, whatever the budget; None: the budget decides


class GroupPattern(Pattern, Protocol):
    """A pattern whose groups compete for a budget: what allocation and mask-making ask of it."""

    def group_size(self, shape: Sequence[int]) -> int | Tensor:
        """Weights in one group of a weight of this shape; [groups] where they differ."""

    def pool(self, scores: Tensor) -> Tensor:
        """Scores of a weight [weight shape] -> one score per group [groups], the sum of its weights'."""

    def expand(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Which groups are kept [groups] -> mask [weight shape]; `scores` as given to `pool`."""


# What a pattern is called -> how it is written, what makes it from its arguments.
PATTERNS: dict[str, tuple[str, Callable[..., Pattern]]] = {
    "unstructured": ("unstructured", Unstructured),
    "block": ("block(bh, bw)", Block),
    "vector": ("vector(v)", Vector),
    "nm": ("nm(n, m)", NM),
    "channel": ("channel or channel(in)", Channel),
}

USAGE = ", ".join(usage for usage, _ in PATTERNS.values())


def get_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern that is written so, or an object that is one; ValueError for anything else."""
    if not isinstance(pattern, str):
        return pattern
    written = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\)\s*)?", pattern)
    if written is None or written[1] not in PATTERNS:
        raise ValueError(f"Expected pattern to be one of {USAGE}, got {pattern!r}")
    usage, make = PATTERNS[written[1]]
    arguments = [int(text) if text.isdecimal() else text for text in map(str.strip, (written[2] or "").split(",")) if text]
    try:
        return make(*arguments)
    except TypeError:
        raise ValueError(f"Expected pattern to be written {usage}, got {pattern!r}") from None
