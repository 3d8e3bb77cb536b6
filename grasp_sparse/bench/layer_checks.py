"""Each sparse layer of a network alone, in float32 on the whole batch, on what the dense network's step hands its counterpart.

End to end, deep networks cannot be compared in float32: rounding grows from layer to layer. One layer on one input can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from grasp_sparse.bench.arms import TOLERANCE, check_close
from grasp_sparse.nn import SparseConv2d, SparseLayer

# Of the largest value that is expected, see check_close; the networks that are measured stay below 1e-6. On CUDA the dense kernels
# may be Winograd's, which round more: there it is what single layers are allowed.
LAYER_TOLERANCE = 1e-5
_PIECE = 2**21  # numbers of an input that are taken into float64 at a time


def check_layers(step: Callable[[], object], dense: nn.Module, pruned: Mapping[str, nn.Module]) -> float:
    """Every SparseLayer of the networks `pruned` against the layer of `dense` that has its name.

    Output and input gradient are compared with the dense layer's; the gradients of weight (kept entries) and bias, sums over batch
    and pixels, which float32 itself rounds, with sums in float64. What a layer is given is let go of when it has been checked, as
    the backward pass goes through them.

    Args:
        step: one forward and backward pass of `dense`, which holds zeros where pruned.
        pruned: by name, in the memory format of `dense`; they are not changed.

    Returns:
        The largest difference, as a share of the largest value.

    Raises:
        WrongResultError: naming the network, the layer and the quantity that differs by more than is allowed.
    """
    layers: dict[str, dict[str, SparseLayer]] = {}
    for arm, model in pruned.items():
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLayer):
                layers.setdefault(name, {})[arm] = layer
    errors = [0.0]
    handles = [dense.get_submodule(name).register_forward_hook(_watch(name, sparse, errors)) for name, sparse in layers.items()]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return max(errors)


def _watch(name: str, sparse: Mapping[str, SparseLayer], errors: list[float]) -> Callable:
    """A forward hook of the dense layer that checks those of `sparse` once the gradient of its output is known.

    It waits at the output tensor: a backward hook of the module forbids the ReLU in place that may follow.
    """

    def after_forward(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if y.requires_grad:
            held = [inputs[0].detach().requires_grad_(inputs[0].requires_grad)]
            y.register_hook(lambda grad: check(layer, held.pop(), grad))

    def check(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        for arm, pruned in sparse.items():
            errors.append(check_layer(f"{arm}: layer {name}", pruned, layer, x, grad))

    return after_forward


def check_layer(label: str, layer: SparseLayer, dense: nn.Module, x: Tensor, grad: Tensor) -> float:
    """`layer` on the input x with the gradient `grad` of what `dense` puts out, against `dense`; the largest difference.

    The gradient of x is compared if x requires one.
    """
    inputs = {"input gradient": x, "weight gradient": layer.values}
    if layer.bias is not None:
        inputs["bias gradient"] = layer.bias
    inputs = {what: tensor for what, tensor in inputs.items() if tensor.requires_grad}
    with torch.enable_grad():
        y, plain = layer(x), dense.forward(x)  # past its hooks, of which one led here
    got = {"output": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))
    expected, scales = {"output": plain.detach()}, {}
    if "input gradient" in got:
        (expected["input gradient"],) = torch.autograd.grad(plain, x, grad)
    expect_sums(layer, x.detach(), grad, got, expected, scales)
    allowed = TOLERANCE["float32"] if x.is_cuda else LAYER_TOLERANCE
    return max(check_close(label, what, got[what], expected[what], allowed, scales.get(what)) for what in got)


def expect_sums(
    layer: SparseLayer, x: Tensor, grad: Tensor, got: dict[str, Tensor], expected: dict[str, Tensor], scales: dict[str, Tensor]
) -> None:
    """What gradients of weight and bias there are in `got`, of the kept entries from here on, are to be, and how large such sums are."""
    if not got.keys() & {"weight gradient", "bias gradient"}:
        return
    weight, bias, spread = _exact_sums(layer, x, grad)
    if "weight gradient" in got:
        mask = layer.mask
        got["weight gradient"], expected["weight gradient"] = layer.placed(got["weight gradient"])[mask], weight[mask]
        scales["weight gradient"] = spread * x.square().mean().sqrt()
    if "bias gradient" in got:
        expected["bias gradient"], scales["bias gradient"] = bias, spread


def _exact_sums(layer: SparseLayer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the dense weight and of the bias, float64, and the largest norm of a channel of `grad`.

    The norm, times that of what it is multiplied by, is how large a sum would be were its signs random. Behind a norm a layer's
    bias has no gradient and a weight may have none: what is left is rounding, to be measured by this.
    """
    convolution = isinstance(layer, SparseConv2d)
    rows = layer.weight_shape[0]
    weight = torch.zeros(layer.weight_shape, dtype=torch.float64, device=x.device)
    bias, squares = weight.new_zeros(rows), weight.new_zeros(rows)
    if not convolution:
        x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, rows)
    piece = max(1, _PIECE * len(x) // max(1, x.numel()))
    for some_x, some_grad in zip(x.split(piece), grad.split(piece), strict=True):
        some_x, some_grad = some_x.double(), some_grad.double()
        if convolution:
            weight += _convolution_weight_gradient(layer, some_x, some_grad)
            some_grad = some_grad.movedim(1, -1).reshape(-1, rows)
        else:
            weight += some_grad.t() @ some_x
        bias += some_grad.sum(0)
        squares += some_grad.square().sum(0)
    return weight, bias, squares.max().sqrt()


def _convolution_weight_gradient(layer: SparseConv2d, x: Tensor, grad: Tensor) -> Tensor:
    top, bottom, left, right = layer.border
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, (left, right, top, bottom), mode=mode)
    return conv2d_weight(padded, layer.weight_shape, grad, layer.stride, 0, layer.dilation)
