"""The network that is planned, and a batch of its input."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(4, 3, 6, 6)


class Net(nn.Module):
    """Two convolutions, the second called twice, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.second(self.second(self.first(x).relu()).relu())
        return self.head(x.mean((2, 3)))


class ReadsWeight(nn.Module):
    """As transformers' T5: one layer is called, and its weight asked for its dtype as well."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(8, 16, bias=False)
        self.wo = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        x = self.wi(x).relu()
        if x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def masks_of(model: nn.Module, density: float = 0.2) -> dict[str, torch.Tensor]:
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    return {name: (torch.randperm(p.numel()) < density * p.numel()).view(p.shape) for name, p in weights.items()}
