"""A sparse convolution and the batch norm behind it in one operation, which leaves out what would pass through memory between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grasp_sparse.nn.conv import SparseConv2d
from grasp_sparse.nn.kernels import looked_through, runs_here
from grasp_sparse.nn.norm import FUSED_ON_CPU, BatchNorm2d, norm_relu
from grasp_sparse.nn.relu import may_fuse
from grasp_sparse.nn.symbolic import is_symbolic
from grasp_sparse.ops import csr_conv2d_batch_norm
from grasp_sparse.ops.layout import is_channels_last, output_size

_LANES_BYTES = 64  # channels of so many bytes are what the kernels take at once


def conv_norm_relu(
    conv: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None, relu: nn.Module | None = None
) -> Tensor:
    """``relu(norm(conv(x)) + residual)``, in as few operations as :func:`conv_norm` and :func:`norm_relu` know of.

    Args:
        relu: as there.
    """
    if fits(conv, norm) and may_fuse(norm, relu) and not is_symbolic(x):
        return conv_norm(conv, norm, x, residual, relu=True)
    return norm_relu(norm, conv(x), residual, relu)


def fits(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the two are layers that :func:`conv_norm` takes. Subclasses with a forward or a call of their own promise nothing."""
    return _is(conv, SparseConv2d) and _is(norm, BatchNorm2d)


def _is(layer: nn.Module, kind: type[nn.Module]) -> bool:
    of = type(layer)
    return isinstance(layer, kind) and of.forward is kind.forward and of.__call__ is nn.Module.__call__


def conv_norm(conv: SparseConv2d, norm: BatchNorm2d, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """``norm(conv(x), residual, relu)``, of which :func:`fits` is true; in one operation where that pays and nobody looks in between.

    That is in training on the CPU, of channels_last images and single weights: the gradient of what the convolution gave is not
    written, but made where it is read.
    """
    if not _together(conv, norm, x, residual):
        asked = {name: given for name, given in (("residual", residual), ("relu", relu or None)) if given is not None}
        return norm(conv(x), **asked)
    window = (conv.kernel_size, conv.stride, conv.border, conv.dilation)
    given = (conv.bias, residual, norm.weight, norm.bias)
    y, mean, var = csr_conv2d_batch_norm(x, conv.values, conv._walked(), *given, norm.eps, relu, *window)
    norm.follow(norm.count_batch(), mean, var, y.numel() // y.shape[1])
    return y


def _together(conv: SparseConv2d, norm: BatchNorm2d, x: Tensor, residual: Tensor | None) -> bool:
    if not (norm.training and may_fuse(conv) and may_fuse(norm)):  # also where no gradient is wanted: the same bits
        return False
    if conv.block_size is not None or conv.padding_mode != "zeros" or conv.out_channels * conv.values.element_size() < _LANES_BYTES:
        return False
    if looked_through() or x.is_cuda or x.dim() != 4 or x.shape[1] != conv.in_channels or not is_channels_last(x):
        return False
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    size = output_size(x.shape[2:], conv.kernel_size, conv.stride, conv.border, conv.dilation)
    shape = (x.shape[0], conv.out_channels, *size)
    several = min(size) > 0 and x.shape[0] * size[0] * size[1] > 1  # one value per channel: torch refuses it, in its own words
    return several and dtype in FUSED_ON_CPU and runs_here(x, (x.dtype,)) and norm.takes(dtype, shape, residual)
