"""What is measured against what: one layer, forward and backward, on every dense path torch has and on the pruned one.

Dense baselines of a convolution: NCHW and channels_last (oneDNN). Of a linear layer: ``nn.Linear`` as users have it (MKL;
on AMD it takes a slower path), and oneDNN's own linear on activations that are in its layout already, which is the fastest.
A pruned convolution is fed in both layouts too, for layout in is layout out and a network may use either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from grasp_sparse.bench.results import DENSE, SPARSE
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseLayer
from grasp_sparse.nn.masked import LaterMask
from grasp_sparse.poison import poisoned_memory

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error relative to the largest value. bfloat16 has 8 bits, and dense kernels round to it in other places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def layout_of(arm: str) -> str:
    """The memory format of an arm of this name, its last word; "rows" for a linear layer's."""
    last = arm.split()[-1]
    return last if last in LAYOUTS else "rows"


def speed_got(row: Mapping[str, str]) -> float:
    """Of a row of a step, times as fast as the network dense in the faster of the formats that it can be in as it is."""
    return min(float(row[column]) for layout in (*LAYOUTS, "rows") if row.get(column := f"vs {DENSE} {layout}"))


class WrongResultError(RuntimeError):
    """A pruned layer or model does not compute what the dense one does: nothing of it is measured."""


class Arm:
    """A layer with its input and incoming gradient; a call runs forward and, unless `grad` is None, backward.

    `input_grad=False` is a network's first layer, whose input needs no gradient. With `precision` bfloat16 the layer runs
    under autocast, on an input that the layer before has left in bfloat16. A masked layer leaves masking to the optimizer, as it
    does in the steps.
    """

    def __init__(
        self, layer: nn.Module, x: Tensor, grad: Tensor | None, *, input_grad: bool = True, precision: str = "float32"
    ) -> None:
        dtype = PRECISIONS[precision]
        self.layer, self.precision = layer, precision
        self.x = x.detach().to(dtype).requires_grad_(input_grad and grad is not None)
        self.grad = None if grad is None else grad.to(dtype)
        self._later = LaterMask(layer) if isinstance(layer, (MaskedLinear, MaskedConv2d)) else None

    def _forward(self) -> Tensor:
        autocast = nullcontext() if self.precision == "float32" else torch.autocast("cpu", PRECISIONS[self.precision])
        with torch.set_grad_enabled(self.grad is not None), autocast:
            return self.layer(self.x)

    def __call__(self) -> Tensor:
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        y = self._forward()
        if self.grad is not None:
            y.backward(self.grad)
        return y

    def results(self, mask: Tensor) -> dict[str, Tensor]:
        """Output and gradients of one call, float32 and plain; of the weight's gradient what belongs to kept weights."""
        y, layer = self(), self.layer
        found = {"output": y.detach()}
        if self.grad is not None:
            found["weight gradient"] = self.weight_gradient(mask)
            if self.x.requires_grad:
                found["input gradient"] = self.x.grad
            if layer.bias is not None:
                found["bias gradient"] = layer.bias.grad
        return {what: (t.to_dense() if t.is_mkldnn else t).contiguous().float() for what, t in found.items()}

    def weight_gradient(self, mask: Tensor) -> Tensor:
        """Gradient of the kept weights [nnz], in row-major order of the dense weight."""
        layer = self.layer
        return (layer.placed(layer.values.grad) if isinstance(layer, SparseLayer) else layer.weight.grad)[mask]


class OneDnnLinear(nn.Module):
    """A linear layer through oneDNN (mkldnn); torch's autograd runs its backward there as well.

    The result is in oneDNN's own layout if the input is; between ordinary layers both are converted.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.is_mkldnn:
            return torch.ops.aten.mkldnn_linear(x, self.weight, self.bias)
        return self(x.to_mkldnn()).to_dense()


def layer_arms(
    dense: nn.Conv2d | nn.Linear, pruned: Mapping[str, nn.Module], x: Tensor, grad: Tensor | None, *,
    input_grad: bool = True, precision: str = "float32",
) -> dict[str, Arm]:
    """Arms by name: "dense nchw", "dense channels_last" ("dense nn.Linear", "dense oneDNN") and, for each label of
    `pruned`, "sparse <label> nchw", … ("sparse <label>" for a linear layer). The layers are copied.

    x, grad: input and incoming gradient of one call, contiguous. grad None: forward only.
    """
    options = {"input_grad": input_grad, "precision": precision}
    if isinstance(dense, nn.Linear):
        arms = {"dense nn.Linear": Arm(copy.deepcopy(dense), x, grad, **options)}
        if precision == "float32":  # nn.Linear goes to oneDNN by itself in bfloat16
            onednn = OneDnnLinear(copy.deepcopy(dense))
            arms["dense oneDNN"] = Arm(onednn, x.to_mkldnn(), None if grad is None else grad.to_mkldnn(), **options)
        return arms | {
            f"{SPARSE} {label}".strip(): Arm(copy.deepcopy(layer), x, grad, **options) for label, layer in pruned.items()
        }
    arms = {}
    for prefix, layer in [(DENSE, dense), *((f"{SPARSE} {label}".strip(), layer) for label, layer in pruned.items())]:
        for name, layout in LAYOUTS.items():
            own = copy.deepcopy(layer).to(memory_format=layout)
            incoming = None if grad is None else grad.to(memory_format=layout)
            arms[f"{prefix} {name}"] = Arm(own, x.to(memory_format=layout), incoming, **options)
    return arms


def check_arms(arms: Mapping[str, Arm], dense: nn.Module, mask: Tensor) -> None:
    """Raises WrongResultError unless every arm computes what its precision's plain `dense` layer with `mask` applied does.

    On memory poisoned with NaN. `arms` are those of one mask; `dense` is not changed.
    """
    reference = copy.deepcopy(dense)
    with torch.no_grad():
        reference.weight.mul_(mask)
    first = next(iter(arms.values()))
    with poisoned_memory():
        plain = Arm(reference, first.x, first.grad, input_grad=first.x.requires_grad, precision=first.precision)
        expected = plain.results(mask)
        for name, arm in arms.items():
            got = arm.results(mask)
            for what, tensor in expected.items():
                check_close(name, what, got[what], tensor, TOLERANCE[arm.precision])


def check_close(name: str, what: str, got: Tensor, expected: Tensor, allowed: float, scale: Tensor | None = None) -> float:
    """The :func:`largest_difference` of the two.

    Raises:
        WrongResultError: naming `what` of `name`; it is more than `allowed`, or not a number.
    """
    error = largest_difference(got, expected, scale)
    if not error <= allowed:  # also when it is NaN
        raise WrongResultError(f"{name}: {what} differs from the dense layer's by {error:.1e} (allowed {allowed:.0e}); nothing is measured")
    return error


def largest_difference(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """As a share of the largest value expected, or of `scale` where that is more."""
    if got.numel() == 0 or not (difference := (got - expected).abs().max()):
        return 0.0
    largest = expected.abs().max()
    return float(difference / (largest if scale is None else torch.maximum(largest, scale.to(largest.dtype))))
