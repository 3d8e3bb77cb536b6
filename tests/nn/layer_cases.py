"""Dense layers to prune in tests, each with an input that fits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grasp_sparse.nn import SparseConv2d, SparseLinear

DENSE = {
    "linear": lambda: (nn.Linear(20, 12), torch.randn(5, 20)),
    "linear-no-bias-3d": lambda: (nn.Linear(20, 12, bias=False), torch.randn(2, 5, 20)),
    "conv": lambda: (nn.Conv2d(4, 6, 3), torch.randn(5, 4, 7, 8)),
    "conv-no-bias-stride-pad": lambda: (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), bias=False), torch.randn(5, 4, 7, 8)),
    "conv-same-even-kernel": lambda: (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 2)), torch.randn(5, 4, 7, 8)),
    "conv-valid": lambda: (nn.Conv2d(4, 6, (5, 1), padding="valid"), torch.randn(5, 4, 7, 8)),
    "conv-1x1": lambda: (nn.Conv2d(4, 6, 1, stride=2), torch.randn(5, 4, 7, 8)),
    "conv-reflect": lambda: (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), torch.randn(5, 4, 7, 8)),
    "conv-circular-same": lambda: (nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular"), torch.randn(5, 4, 7, 8)),
    "conv-one-image": lambda: (nn.Conv2d(4, 6, 3, padding=1), torch.randn(4, 7, 8)),
}


def random_mask(module: nn.Module, density: float = 0.3) -> Tensor:
    return torch.rand(module.weight.shape) < density


def pruned(module: nn.Module, mask: Tensor) -> nn.Module:
    """``module`` with its weight multiplied by the mask, in place: the dense layer that a sparse one stands for."""
    with torch.no_grad():
        module.weight.mul_(mask)
    return module


def sparse_of(module: nn.Module, mask: Tensor, block_size: tuple[int, int] | None = None) -> nn.Module:
    return (SparseLinear if isinstance(module, nn.Linear) else SparseConv2d).from_dense(module, mask, block_size)
