"""Random: keep a uniformly random choice. Tells how much of a result is the layer densities; needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def random_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Any, loss_fn: Any = None
) -> dict[str, Tensor]:
    """Uniform in [0, 1) for every weight, from torch's CPU generator, so that every device gets the same choice.

    float64, because float32 would have ties among tens of millions of weights, and ties go to the first index.
    """
    return {name: torch.rand(weight.shape, dtype=torch.float64).to(weight.device) for name, weight in weights.items()}
