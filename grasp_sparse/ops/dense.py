"""The passes of linear layers and convolutions with a dense weight: what the references of all formats come down to.

Results have the dtype and layout of the activations; weights and their gradients are in ``compute_dtype`` of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import empty_images, empty_rows, output_size


def computed(activations: Tensor) -> Tensor:
    """In the dtype that is computed in."""
    return activations.to(compute_dtype(activations.dtype))


def linear(weight: Tensor, bias: Tensor | None, x: Tensor, relu: bool = False) -> Tensor:
    y = F.linear(computed(x), weight, bias)
    return empty_rows(x, y.shape).copy_(y.relu() if relu else y)


def linear_t(weight: Tensor, g: Tensor) -> Tensor:
    return empty_rows(g, (g.shape[0], weight.shape[1])).copy_(computed(g) @ weight)


def fprop(weight: Tensor, bias: Tensor | None, x: Tensor, stride, padding, dilation, relu: bool = False) -> Tensor:
    size = (x.shape[0], weight.shape[0], *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation))
    if weight.numel() == 0:  # torch refuses no output channels, and from no input channels makes no output channels
        y = x.new_zeros(size) if bias is None else bias.view(-1, 1, 1).expand(size)
    else:
        y = F.conv2d(_pad(computed(x), padding), weight, bias, tuple(stride), 0, tuple(dilation))
    return empty_images(x, size).copy_(y.relu() if relu else y)


def dgrad(weight: Tensor, g: Tensor, input_size: Sequence[int], stride, padding, dilation) -> Tensor:
    top, bottom, left, right = padding
    height, width = input_size
    padded = weight.new_zeros(g.shape[0], weight.shape[1], height + top + bottom, width + left + right)
    dx, _ = _conv_backward(computed(g), padded, weight, stride, dilation, (True, False))
    dx = dx[:, :, top : top + height, left : left + width]
    return empty_images(g, dx.shape).copy_(dx)


def wgrad(g: Tensor, x: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    x = computed(x)
    weight = x.new_zeros(g.shape[1], x.shape[1], *kernel_size)
    return _conv_backward(computed(g), _pad(x, padding), weight, stride, dilation, (False, True))[1]


def _pad(x: Tensor, padding) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


def _conv_backward(g, x, weight, stride, dilation, wanted: tuple[bool, bool]):
    # A batch of zero: torch's own backward refuses it on some back-ends, and the answer is known.
    if g.numel() == 0 or weight.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, list(stride), [0, 0], list(dilation), False, [0, 0], 1, [*wanted, False]
    )
    return dx, dw
