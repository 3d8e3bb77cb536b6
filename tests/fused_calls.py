"""Which layers applied the ReLU behind them."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from grasp_sparse.nn import BatchNorm2d, SparseConv2d, SparseLinear


def fused_calls(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The layers that were asked to apply a ReLU in one forward of ``model``, once for each time."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (BatchNorm2d, SparseConv2d, SparseLinear):

            def forward(self, *arguments, forward=kind.forward, relu=False):
                if relu:
                    asked.append(self)
                return forward(self, *arguments, relu=relu)

            patch.setattr(kind, "forward", forward)
        model(x)
    return asked
