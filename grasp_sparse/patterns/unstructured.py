"""Unstructured: every weight is kept or pruned on its own. The pattern of the paper, and the most accurate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """Groups of one weight, in row-major order."""

    name: ClassVar[str] = "unstructured"
    block_size: ClassVar[None] = None
    density: ClassVar[None] = None

    def group_size(self, shape: Sequence[int]) -> int:
        return 1

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten()

    def expand(self, kept: Tensor, scores: Tensor) -> Tensor:
        return kept.view(scores.shape)
