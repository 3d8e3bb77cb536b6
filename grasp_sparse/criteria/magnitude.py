"""Magnitude: keep the largest weights. The baseline every other criterion has to beat; needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def magnitude_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Any, loss_fn: Any = None
) -> dict[str, Tensor]:
    """|θ| for every weight."""
    return {name: weight.detach().abs() for name, weight in weights.items()}
