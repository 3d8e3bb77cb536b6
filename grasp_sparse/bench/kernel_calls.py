"""One kernel of a layer alone: the product of its forward pass, or one of the two of its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grasp_sparse.nn import SparseConv2d, SparseLayer

# What each of them computes, by the name that it has among a layer's results.
KERNELS = {"fprop": "output", "dgrad": "input gradient", "wgrad": "weight gradient"}

_ops, _aten = torch.ops.grasp_sparse, torch.ops.aten


def kernel_call(kernel: str, layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """A call of ``kernel`` as autograd makes it for ``layer``, dense or sparse, on the input x and the gradient of its output.

    The wgrad of a sparse layer is that of ``values``. Nothing is cast; expects to be called without gradients.
    """
    return (_sparse_call if isinstance(layer, SparseLayer) else _dense_call)(kernel, layer, x.detach(), grad)


def _sparse_call(kernel: str, layer: SparseLayer, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    values, indices, blocks = layer.values.detach(), layer.indices, layer.block_size is not None
    out_channels, in_channels = layer.weight_shape[:2]
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, SparseConv2d):
        names = {name: f"conv2d_{name}" for name in KERNELS}
        window = [list(size) for size in (layer.kernel_size, layer.stride, layer.border, layer.dilation)]
        images = [list(x.shape[2:])]
    else:
        names, window, images = {"fprop": "spmm", "dgrad": "spmm_t", "wgrad": "sddmm"}, [], []
    operands, size, rest = {
        "fprop": ((values, *indices, bias, x), out_channels, window),
        "dgrad": ((values, *indices, grad), in_channels, images + window),
        "wgrad": ((*indices, grad, x), layer.block_size, window),
    }[kernel]
    operation = getattr(_ops, f"{'bsr' if blocks else 'csr'}_{names[kernel]}")
    return lambda: operation(*operands, *([size] if blocks else []), *rest)


def _dense_call(kernel: str, layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    weight = layer.weight.detach()
    if kernel == "fprop":
        return lambda: layer(x)
    if isinstance(layer, nn.Linear):
        return lambda: grad @ weight if kernel == "dgrad" else grad.t() @ x
    of_input = kernel == "dgrad"
    window = layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups
    return lambda: _aten.convolution_backward(grad, x, weight, None, *window, (of_input, not of_input, False))[not of_input]
