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

from grasp_sparse.bench.arms import LAYOUTS, Arm, WrongResultError, largest_difference
from grasp_sparse.bench.kernel_calls import KERNELS, kernel_call
from grasp_sparse.bench.precision import STORAGE, TOLERANCE, precision
from grasp_sparse.bench.results import DENSE
from grasp_sparse.nn import SparseLayer


class CudaArm(Arm):
    """An :class:`~grasp_sparse.bench.arms.Arm` in one more precision, "tf32", whose dense layer is in its precision already.

    Runs on whatever device its tensors are on; on the CPU "tf32" is float32. With `kernel`, a call runs that one alone (see
    :mod:`grasp_sparse.bench.kernel_calls`).
    """

    def __init__(
        self, layer: nn.Module, x: Tensor, grad: Tensor | None, precision: str, input_grad: bool = True, kernel: str | None = None
    ) -> None:
        dtype = STORAGE[precision]
        self.layer, self.precision = layer, precision
        self.pruned = isinstance(layer, SparseLayer)
        if not self.pruned:
            layer.to(dtype)
        self.x = x.detach().to(dtype).requires_grad_(input_grad and grad is not None)
        self.grad = None if grad is None else grad.to(dtype)
        self.kernel, self.alone = kernel, kernel and kernel_call(kernel, layer, self.x, self.grad)

    def _forward(self) -> Tensor:
        casts = self.pruned and self.precision == "bfloat16"
        autocast = torch.autocast(self.x.device.type, torch.bfloat16) if casts else nullcontext()
        with torch.set_grad_enabled(self.grad is not None), autocast:
            return self.layer(self.x)

    def __call__(self) -> Tensor:
        with precision(self.precision):
            if self.alone is None:
                return super().__call__()
            with torch.no_grad():
                return self.alone()

    def results(self) -> dict[str, Tensor]:
        """Output and gradients of one call, or what a kernel gives, in float64; that of the weight dense, zeros where pruned."""
        layer, y = self.layer, self().detach()
        found = {KERNELS[self.kernel] if self.kernel else "output": y}
        if self.kernel == "wgrad" and self.pruned:
            found["weight gradient"] = layer.placed(y)
        if self.alone is None and self.grad is not None:
            if self.x.requires_grad:
                found["input gradient"] = self.x.grad
            if layer.bias is not None:
                found["bias gradient"] = layer.bias.grad
            found["weight gradient"] = layer.placed(layer.values.grad) if self.pruned else layer.weight.grad
        return {what: tensor.double() for what, tensor in found.items()}


def dense_arms(
    dense: nn.Module, x: Tensor, grad: Tensor | None, *, input_grad: bool = True, kernel: str | None = None
) -> dict[str, CudaArm]:
    """"dense <precision> <layout>" for every precision; a linear layer has the layout "rows"."""
    arms = {}
    for name in STORAGE:
        for layout in LAYOUTS if x.dim() == 4 else ("rows",):
            own = laid(copy.deepcopy(dense), layout)
            arms[f"{DENSE} {name} {layout}"] = CudaArm(own, laid(x, layout), laid(grad, layout), name, input_grad, kernel)
    return arms


def check(arms: Mapping[str, CudaArm], dense: nn.Module, mask: Tensor) -> None:
    """Raises WrongResultError unless every arm computes what `dense` with `mask` applied does in float64."""
    for name, what in wrong_arms(arms, dense, mask).items():
        raise WrongResultError(f"{name}: {what}; nothing is measured")


def wrong_arms(arms: Mapping[str, CudaArm], dense: nn.Module, mask: Tensor) -> dict[str, str]:
    """The arms that do not compute what `dense` with `mask` applied does in float64, with what is wrong.

    The inputs of both are rounded to the arm's precision, and in float64 there is no TF32: what is allowed is what the arm's own
    products may differ by. The arms have one input and, where they have any, one incoming gradient; `dense` is not changed.
    """
    expected: dict[torch.dtype, dict[str, Tensor]] = {}
    wrong = {}
    for name, arm in arms.items():
        dtype, allowed = STORAGE[arm.precision], TOLERANCE[arm.precision]
        if dtype not in expected:
            alike = [other for other in arms.values() if STORAGE[other.precision] == dtype]
            expected[dtype] = _exact(next((other for other in alike if other.grad is not None), arm), dense, mask)
        for what, result in arm.results().items():
            tensor = expected[dtype][what]
            result = result * mask if what == "weight gradient" else result
            error = largest_difference(result, tensor)
            if not error <= allowed:  # also when it is NaN
                wrong[name] = f"{what} differs from the dense layer's in float64 by {error:.1e} (allowed {allowed:.0e})"
                break
    return wrong


def _exact(arm: CudaArm, dense: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """What the arm should compute, in float64, by names as in `CudaArm.results`."""
    reference = copy.deepcopy(dense).to(STORAGE[arm.precision]).double()
    with torch.no_grad():
        reference.weight.mul_(mask)
    x = arm.x.detach().double().contiguous().requires_grad_(arm.x.requires_grad)
    searched, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # once is not worth a search
    try:
        y = reference(x)
        expected = {"output": y.detach()}
        if arm.grad is not None:
            y.backward(arm.grad.double().contiguous())
            expected["weight gradient"] = reference.weight.grad * mask
            if x.requires_grad:
                expected["input gradient"] = x.grad
            if reference.bias is not None:
                expected["bias gradient"] = reference.bias.grad
    finally:
        torch.backends.cudnn.benchmark = searched
    return expected


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
    pruned: Mapping[str, nn.Module], x: Tensor, grad: Tensor | None, precisions: tuple[str, ...], *, input_grad: bool = True,
    kernel: str | None = None,
) -> dict[str, CudaArm]:  # fmt: skip
    """"sparse <label> <precision> <layout>" for each label of `pruned`: images channels_last, rows as they are, and both with the
    batch innermost where single weights are stored; a kernel alone in the layout that it works in."""
    arms = {}
    usual, innermost = ("channels_last", "chwn") if x.dim() == 4 else ("rows", "feature-major")
    for label, layer in pruned.items():
        layouts = (usual,) if layer.block_size else (innermost,) if kernel else (usual, innermost)
        for name in precisions:
            for layout in layouts:
                own, given = copy.deepcopy(layer), (laid(x, layout), laid(grad, layout))
                arms[f"sparse {label} {name} {layout}"] = CudaArm(own, *given, name, input_grad, kernel)
    return arms
