"""Each sparse convolution and the norm behind it where they run as one operation, in float32 on the whole batch, on what a step
of the pruned network hands them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grasp_sparse.bench.arms import check_close
from grasp_sparse.bench.layer_checks import LAYER_TOLERANCE, expect_sums
from grasp_sparse.formats import CsrIndices
from grasp_sparse.nn import SparseConv2d, conv_norm
from grasp_sparse.ops import csr_conv2d_batch_norm


@contextmanager
def checked_pairs(name: str, model: nn.Module) -> Iterator[list[float]]:
    """Inside, whatever a backward pass of `model` comes through of such pairs is computed once more and checked.

    Yields a list that takes up the largest difference of each, as a share of the largest value. Running statistics move with
    the passes of the caller alone.

    Raises:
        WrongResultError: in the backward pass, naming `name`, the convolution and the quantity that differs by more than is
            allowed.
    """
    layers = {layer.values: (path, layer) for path, layer in model.named_modules() if isinstance(layer, SparseConv2d)}
    errors: list[float] = []

    def watched(
        x: Tensor, values: Tensor, indices: CsrIndices, bias: Tensor | None, residual: Tensor | None, *how
    ) -> tuple[Tensor, ...]:
        results = csr_conv2d_batch_norm(x, values, indices, bias, residual, *how)
        if results[0].requires_grad and values in layers:
            path, layer = layers[values]
            held = [[None if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, residual)]]
            label = f"{name}: layer {path} and its norm"
            results[0].register_hook(lambda grad: errors.append(check_pair(label, layer, *held.pop(), grad, *how)))
        return results

    conv_norm.csr_conv2d_batch_norm = watched  # with hooks on its layers no pair would run as one
    try:
        yield errors
    finally:
        conv_norm.csr_conv2d_batch_norm = csr_conv2d_batch_norm


def check_pair(
    label: str, layer: SparseConv2d, x: Tensor, residual: Tensor | None, grad: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, *window: Sequence[int],
) -> float:  # fmt: skip
    """``relu(norm(layer(x)) + residual)`` with the gradient `grad` of it, against a dense convolution in float32 and torch's norm
    in float64; the largest difference. Gradients of weights and biases, sums over batch and pixels, are compared with sums in
    float64.

    Args:
        weight, bias, eps: of the norm.
        window: kernel_size, stride, border and dilation of the convolution.
    """
    inputs = {
        "input gradient": x, "residual gradient": residual, "weight gradient": layer.values, "bias gradient": layer.bias,
        "norm weight gradient": weight, "norm bias gradient": bias,
    }  # fmt: skip
    inputs = {what: tensor for what, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    with torch.enable_grad():
        y = csr_conv2d_batch_norm(x, layer.values, layer.indices, layer.bias, residual, weight, bias, eps, relu, *window)[0]
        z = layer.to_dense()(x)
        exact = [None if t is None else t.detach().double().requires_grad_() for t in (z, weight, bias)]
        normed = F.batch_norm(exact[0], None, None, *exact[1:], True, 0, eps)
    got = {"output": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))
    plain = normed.detach() if residual is None else normed.detach() + residual.detach()
    expected = {"output": plain.relu() if relu else plain}
    # Where the input of the ReLU is almost zero, rounding decides whether a gradient goes through: it does as y says.
    grad = torch.where(y > 0, grad, 0).double() if relu else grad.double()
    expected["residual gradient"] = grad
    of_norm = iter(torch.autograd.grad(normed, [t for t in exact if t is not None], grad))
    of_z, expected["norm weight gradient"], expected["norm bias gradient"] = (None if t is None else next(of_norm) for t in exact)
    if x.requires_grad:
        (expected["input gradient"],) = torch.autograd.grad(z, x, of_z.to(z.dtype))
    # How large sums would be were their signs random, as in expect_sums; what the norm multiplies by has a variance of one.
    scales = dict.fromkeys(("norm weight gradient", "norm bias gradient"), grad.square().sum((0, 2, 3)).max().sqrt())
    expect_sums(layer, x.detach(), of_z, got, expected, scales)
    return max(check_close(label, what, got[what], expected[what], LAYER_TOLERANCE, scales.get(what)) for what in got)
