"""Small networks and data the criteria's laws are checked on."""

from __future__ import annotations

import torch
from torch import nn


def smooth_net(seed: int = 0) -> nn.Module:
    """Conv and Linear with smooth activations and no normalisation: finite differences are exact, cuts do not matter."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 2 * 2, 5)
    )


def norm_net(seed: int = 0, eps: float = 1e-5) -> nn.Module:
    """Convolutions feeding only BatchNorm, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6, eps=eps),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=eps),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Dropout(0.3),
        nn.Linear(16, 5),
    )


def data(samples: int = 20, seed: int = 1, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 6, 6, generator=generator), torch.arange(samples) % classes
