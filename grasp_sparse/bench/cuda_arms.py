"""What is measured against what on a GPU: one layer, dense in every precision and memory format, pruned in every pattern.

The dense layer of a precision has its weights in that precision already; a pruned one keeps float32 values, as in training, and
runs under autocast. So the dense side is the fastest there is, not what autocast would make of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from grasp_sparse.bench.arms import LAYOUTS, Arm, check_close
from grasp_sparse.bench.precision import STORAGE, TOLERANCE, precision
from grasp_sparse.bench.results import DENSE
from grasp_sparse.nn import SparseLayer


class CudaArm(Arm):
    """An :class:`~grasp_sparse.bench.arms.Arm` in one more precision, "tf32", whose dense layer is in its precision already.

    Runs on whatever device its tensors are on; on the CPU "tf32" is float32.
    """

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor | None, precision: str, input_grad: bool = True) -> None:
        dtype = STORAGE[precision]
        self.layer, self.precision = layer, precision
        self.pruned = isinstance(layer, SparseLayer)
        if not self.pruned:
            layer.to(dtype)
        self.x = x.detach().to(dtype).requires_grad_(input_grad and grad is not None)
        self.grad = None if grad is None else grad.to(dtype)

    def _forward(self) -> Tensor:
        casts = self.pruned and self.precision == "bfloat16"
        autocast = torch.autocast(self.x.device.type, torch.bfloat16) if casts else nullcontext()
        with torch.set_grad_enabled(self.grad is not None), autocast:
            return self.layer(self.x)

    def __call__(self) -> Tensor:
        with precision(self.precision):
            return super().__call__()

    def results(self) -> dict[str, Tensor]:
        """Output and gradients of one call in float64; that of the weight is dense, zeros where pruned."""
        found = {"output": self().detach()}
        if self.grad is not None:
            layer = self.layer
            if self.x.requires_grad:
                found["input gradient"] = self.x.grad
            if layer.bias is not None:
                found["bias gradient"] = layer.bias.grad
            found["weight gradient"] = layer.placed(layer.values.grad) if self.pruned else layer.weight.grad
        return {what: tensor.double() for what, tensor in found.items()}


def dense_arms(dense: nn.Module, x: Tensor, grad: Tensor | None, *, input_grad: bool = True) -> dict[str, CudaArm]:
    """"dense <precision> <layout>" for every precision; a linear layer has the layout "rows"."""
    arms = {}
    for name in STORAGE:
        for layout in LAYOUTS if x.dim() == 4 else ("rows",):
            own = laid(copy.deepcopy(dense), layout)
            arms[f"{DENSE} {name} {layout}"] = CudaArm(own, laid(x, layout), laid(grad, layout), name, input_grad)
    return arms


def check(arms: Mapping[str, CudaArm], dense: nn.Module, mask: Tensor) -> None:
    """Raises WrongResultError unless every arm computes what `dense` with `mask` applied does in float64.

    The inputs of both are rounded to the arm's precision; `dense` is not changed.
    """
    for name, arm in arms.items():
        reference = copy.deepcopy(dense).to(STORAGE[arm.precision]).double()
        with torch.no_grad():
            reference.weight.mul_(mask)
        grad = None if arm.grad is None else arm.grad.double().contiguous()
        x = arm.x.detach().double().contiguous().requires_grad_(arm.x.requires_grad)
        y = reference(x)
        expected = {"output": y.detach()}
        if grad is not None:
            y.backward(grad)
            expected["weight gradient"] = reference.weight.grad * mask
            if x.requires_grad:
                expected["input gradient"] = x.grad
            if reference.bias is not None:
                expected["bias gradient"] = reference.bias.grad
        got = arm.results()
        for what, tensor in expected.items():
            result = got[what] * mask if what == "weight gradient" else got[what]
            check_close(name, what, result, tensor, TOLERANCE[arm.precision], of="the dense layer's in float64")


def laid(what, layout: str):
    """A layer or tensor in that memory format; of images `chwn`, of rows `feature-major` is the batch innermost."""
    if what is None or layout == "rows":
        return what
    if layout in ("chwn", "feature-major"):
        return what if isinstance(what, nn.Module) else what.movedim(0, -1).contiguous().movedim(-1, 0)
    if isinstance(what, nn.Module):
        return what.to(memory_format=LAYOUTS[layout])
    return what.contiguous(memory_format=LAYOUTS[layout])


def pruned_arms(
    pruned: Mapping[str, nn.Module], x: Tensor, grad: Tensor | None, precisions: tuple[str, ...], *, input_grad: bool = True
) -> dict[str, CudaArm]:
    """"sparse <label> <precision> <layout>" for each label of `pruned`: images channels_last, rows as they are, and both with the
    batch innermost where single weights are stored."""
    arms = {}
    usual, innermost = ("channels_last", "chwn") if x.dim() == 4 else ("rows", "feature-major")
    for label, layer in pruned.items():
        layouts = (usual,) if layer.block_size else (usual, innermost)
        for name in precisions:
            for layout in layouts:
                own = copy.deepcopy(layer)
                arms[f"sparse {label} {name} {layout}"] = CudaArm(own, laid(x, layout), laid(grad, layout), name, input_grad)
    return arms
