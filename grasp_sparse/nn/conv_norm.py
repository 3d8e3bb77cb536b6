"""A sparse convolution and the batch norm behind it in one operation, which leaves out what would pass through memory between them."""

from __future__ import annotations

from torch import Tensor, nn

from grasp_sparse.nn.conv import SparseConv2d
from grasp_sparse.nn.kernels import looked_through, runs_here
from grasp_sparse.nn.norm import FUSED_ON_CPU, BatchNorm2d, norm_relu
from grasp_sparse.nn.relu import behaves_as, may_fuse
from grasp_sparse.nn.symbolic import is_symbolic
from grasp_sparse.ops import csr_conv2d_batch_norm
from grasp_sparse.ops.dtypes import autocast_dtype
from grasp_sparse.ops.layout import is_channels_last, output_size

_LANES_BYTES = 64  # channels of so many bytes are what the kernels take at once


def conv_norm_relu(
    conv: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None, relu: nn.Module | None = None
) -> Tensor:
    """``relu(norm(conv(x)) + residual)``, in as few operations as there are: one in training on the CPU, of a sparse convolution of single
    weights and channels_last images, with 16 output channels or more (float64: 8); else as :func:`norm_relu`.

    Not where a hook or a ``forward`` of its own is to see one of the layers alone.

    Args:
        relu: the module that is called, or passed over; None applies ``F.relu``.
    """
    if runs_as_one(conv, norm, x, residual) and may_fuse(norm, relu):
        return run_as_one(conv, norm, x, residual, relu=True)
    return norm_relu(norm, conv(x), residual, relu)


def is_pair(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether these are layers that may :func:`runs_as_one`."""
    return behaves_as(conv, SparseConv2d) and behaves_as(norm, BatchNorm2d)


def run_as_one(conv: SparseConv2d, norm: BatchNorm2d, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """``norm(conv(x), residual, relu)`` in one operation; of layers that :func:`runs_as_one`.

    The gradient of what the convolution gave is not written, but made where it is read.
    """
    window = (conv.kernel_size, conv.stride, conv.border, conv.dilation)
    given = (conv.bias, residual, norm.weight, norm.bias)
    y, mean, var = csr_conv2d_batch_norm(x, conv.values, conv._walked(), *given, norm.eps, relu, *window)
    norm.follow(norm.running(), norm.count_batch(), mean, var, y.numel() // y.shape[1])
    return y


def runs_as_one(conv: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether :func:`run_as_one` pays and nobody looks in between. Also where no gradient is wanted: the bits are the same then."""
    if is_symbolic(x) or not (is_pair(conv, norm) and norm.training and may_fuse(conv) and may_fuse(norm)):
        return False
    if conv.block_size is not None or conv.padding_mode != "zeros" or conv.out_channels * conv.values.element_size() < _LANES_BYTES:
        return False
    if looked_through() or x.is_cuda or x.dim() != 4 or x.shape[1] != conv.in_channels or not is_channels_last(x):
        return False
    dtype = autocast_dtype(x) or x.dtype
    size = output_size(x.shape[2:], conv.kernel_size, conv.stride, conv.border, conv.dilation)
    shape = (x.shape[0], conv.out_channels, *size)
    several = min(size) > 0 and x.shape[0] * size[0] * size[1] > 1  # one value per channel: torch refuses it, in its own words
    return several and dtype in FUSED_ON_CPU and runs_here(x, FUSED_ON_CPU) and norm.takes(dtype, shape, residual, norm.running())
