"""What is measured against what: one layer, forward and backward, on every dense path torch has and on the sparse one.

Dense baselines of a convolution: NCHW and channels_last (oneDNN). Of a linear layer: ``nn.Linear`` as users have it (MKL;
on AMD it takes a slower path), and oneDNN's own linear on activations that are in its layout already, which is the fastest.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.shapes import ConvShape, LinearShape
from grasp_sparse.nn import SparseConv2d, SparseLayer, SparseLinear
from grasp_sparse.poison import poisoned_memory

SPARSE = "sparse"


class Arm:
    """A layer with its input and incoming gradient; a call runs forward and backward."""

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        self.layer, self.x, self.grad = layer, x.detach().requires_grad_(), grad

    def __call__(self) -> Tensor:
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        y = self.layer(self.x)
        y.backward(self.grad)
        return y


def make_arms(shape: ConvShape | LinearShape, density: float, generator: torch.Generator) -> dict[str, Arm]:
    """The arms by name; all compute the same function of the same input, since the dense weight holds the pruned one."""
    return (_conv_arms if isinstance(shape, ConvShape) else _linear_arms)(shape, density, generator)


def _pruned(layer: nn.Module, density: float, generator: torch.Generator) -> Tensor:
    """A random mask of exactly round(density * n) places; the weight is zeroed elsewhere."""
    count = layer.weight.numel()
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: round(density * count)]] = True
    mask = mask.view_as(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(mask)
    return mask


def _conv_arms(shape: ConvShape, density: float, generator: torch.Generator) -> dict[str, Arm]:
    conv = nn.Conv2d(shape.in_channels, shape.out_channels, shape.kernel, padding=shape.kernel // 2)
    mask = _pruned(conv, density, generator)
    x = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size, generator=generator)
    grad = torch.randn(shape.batch, shape.out_channels, shape.size, shape.size, generator=generator)
    arms = {SPARSE: Arm(SparseConv2d.from_dense(conv, mask), x, grad)}
    for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        dense = copy.deepcopy(conv).to(memory_format=layout)
        arms[f"dense {name}"] = Arm(dense, x.to(memory_format=layout), grad.to(memory_format=layout))
    return arms


def _linear_arms(shape: LinearShape, density: float, generator: torch.Generator) -> dict[str, Arm]:
    linear = nn.Linear(shape.in_features, shape.out_features)
    mask = _pruned(linear, density, generator)
    x = torch.randn(shape.batch, shape.in_features, generator=generator)
    grad = torch.randn(shape.batch, shape.out_features, generator=generator)
    onednn = OneDnnLinear(copy.deepcopy(linear))
    return {
        SPARSE: Arm(SparseLinear.from_dense(copy.deepcopy(linear), mask), x, grad),
        "dense nn.Linear": Arm(linear, x, grad),
        "dense oneDNN": Arm(onednn, x.to_mkldnn(), grad.to_mkldnn()),
    }


class OneDnnLinear(nn.Module):
    """A linear layer on oneDNN (mkldnn) tensors; torch's autograd runs its backward there as well."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.mkldnn_linear(x, self.weight, self.bias)


def check(arms: dict[str, Arm], tolerance: float = 1e-4) -> None:
    """Raises RuntimeError unless the sparse arm computes what the dense ones do, on memory poisoned with NaN."""
    with poisoned_memory():
        results = {name: _results(arm, arms[SPARSE].layer.mask) for name, arm in arms.items()}
    for name, dense in results.items():
        for what, expected in dense.items():
            got = results[SPARSE][what]
            error = (got - expected).abs().max() / expected.abs().max()
            if not error <= tolerance:  # also when it is NaN
                raise RuntimeError(
                    f"sparse {what} differs from {name} by {float(error):.2e} (allowed {tolerance:.0e}); nothing is measured"
                )


def _results(arm: Arm, mask: Tensor) -> dict[str, Tensor]:
    y, layer = arm(), arm.layer
    kept = layer.values.grad.flatten() if isinstance(layer, SparseLayer) else layer.weight.grad[mask]
    found = {"output": y.detach(), "input gradient": arm.x.grad, "weight gradient": kept, "bias gradient": layer.bias.grad}
    return {what: tensor.to_dense() if tensor.is_mkldnn else tensor.contiguous() for what, tensor in found.items()}
