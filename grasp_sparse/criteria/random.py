"""Random: keep a uniformly random choice. Tells how much of a result is the layer densities; needs no data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def random_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Any, loss_fn: Any = None
) -> dict[str, Tensor]:
    """Cauchy distributed for every weight, from torch's CPU generator, so that every device gets the same choice.

    The mean of any number of Cauchy variables is distributed as one of them, so that groups of any size (blocks, and smaller ones
    at edges) have the same chance where a weight costs the same everywhere; of uniform numbers the smallest groups would make up
    both ends. float64, because float32 would have ties among tens of millions of weights, and ties go to the first index.
    """
    uniform = {name: torch.rand(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    return {name: values.sub_(0.5).mul_(math.pi).tan_().to(weights[name].device) for name, values in uniform.items()}
