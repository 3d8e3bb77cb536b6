"""Channels: whole outputs or inputs of a layer, which leaves a smaller dense layer behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grasp_sparse.patterns.checks import check_weight

_DIMENSIONS = {"out": 0, "in": 1}


@dataclass(frozen=True)
class Channel:
    """Groups are all weights of one output channel (rows of a linear weight), or of one input channel with side="in"."""

    side: str = "out"
    block_size: ClassVar[None] = None
    density: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.side not in _DIMENSIONS:
            raise ValueError(f"Expected channel or channel(in), got channel({self.side})")

    @property
    def name(self) -> str:
        return "channel" if self.side == "out" else f"channel({self.side})"

    def group_size(self, shape: Sequence[int]) -> int:
        check_weight(self.name, shape)
        return torch.Size(shape).numel() // max(1, shape[_DIMENSIONS[self.side]])

    def pool(self, scores: Tensor) -> Tensor:
        check_weight(self.name, scores.shape)
        return scores.movedim(_DIMENSIONS[self.side], 0).flatten(1).sum(1, dtype=torch.float64)

    def expand(self, kept: Tensor, scores: Tensor) -> Tensor:
        sizes = [1] * scores.dim()
        sizes[_DIMENSIONS[self.side]] = -1
        return kept.view(sizes).expand(scores.shape).contiguous()
