"""A model that has every kind of parameter: sparse values, masked weights (one channels_last), dense weights and biases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear


def mixed_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Input ``[N, 2, 8, 8]``, output ``[N, 5]``; the same weights and masks at every call."""
    generator = torch.Generator().manual_seed(0)

    def reduced(kind, module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        mask = torch.rand(module.weight.shape, generator=generator) < 0.4
        return kind.from_dense(module.to(dtype), mask)

    filters = nn.Conv2d(2, 6, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(
        reduced(MaskedConv2d, filters), nn.Tanh(), reduced(SparseConv2d, nn.Conv2d(6, 4, 3, stride=2)), nn.Tanh(), nn.Flatten(),
        reduced(SparseLinear, nn.Linear(16, 9)), nn.LayerNorm(9, dtype=dtype), reduced(MaskedLinear, nn.Linear(9, 5)),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, seed: int = 1, scheduler=None) -> None:
    """Ordinary steps on random batches drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        backward(model, generator)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def backward(model: nn.Module, generator: torch.Generator, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
    x = torch.randn(8, 2, 8, 8, generator=generator).to(next(model.parameters()).dtype)
    scale(nn.functional.cross_entropy(model(x), torch.randint(5, (8,), generator=generator))).backward()


def assert_equal_parameters(actual: nn.Module, expected: nn.Module, **tolerance) -> None:
    """Bit for bit without a tolerance."""
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)), msg=lambda text, name=name: f"{name}: {text}")
