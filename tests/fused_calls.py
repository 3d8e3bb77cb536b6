"""What tests of fused models look at: which layers applied the ReLU behind them, everything that a step gives, the classes."""

from __future__ import annotations

import pytest
import torch
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


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, input gradient, parameter gradients and buffers after one training step, and the output in evaluation."""
    x = x.detach().requires_grad_()
    y = model.train()(x)
    gradients = torch.autograd.grad(y.square().sum(), (x, *model.parameters()))
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        return [y, *gradients, *buffers, model.eval()(x)]


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]
