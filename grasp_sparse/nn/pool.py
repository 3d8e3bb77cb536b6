"""Pooling in the layout of its input; max pooling with one byte a window kept for the backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from grasp_sparse.nn.kernels import looked_through, runs_here
from grasp_sparse.nn.symbolic import called, is_symbolic
from grasp_sparse.ops.differentiable import call
from grasp_sparse.ops.layout import is_batch_innermost, is_channels_last

_MOST_TAPS = 255  # a place in the window is one byte


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``: the same results and gradients. On the CPU, in float32, float64 and bfloat16, by kernels that write the
    layout they read; on CUDA where that is batch innermost, in float16 too. In channels_last torch's own is as fast or faster; that
    and everything else, indices among it, is left to it.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as ``nn.MaxPool2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_symbolic(input):
            return called(self, input)
        if looked_through():
            return super().forward(input)
        kernel_size, stride, padding, dilation = map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation))
        if not self._supported(input, kernel_size, padding, dilation):
            return super().forward(input)
        return call("max_pool2d", input, kernel_size, stride, padding, dilation, self.ceil_mode)[0]

    def _supported(self, x: Tensor, kernel_size, padding, dilation) -> bool:
        if x.dim() != 4 or x.numel() == 0 or self.return_indices:
            return False
        if not runs_here(x, cpu=(torch.float32, torch.float64, torch.bfloat16)):
            return False
        if is_channels_last(x):
            return False
        reaches = [spread * (kernel - 1) + 1 for kernel, spread in zip(kernel_size, dilation, strict=True)]
        fits = all(size + 2 * pad >= reach >= 2 * pad for size, pad, reach in zip(x.shape[2:], padding, reaches, strict=True))
        return fits and kernel_size[0] * kernel_size[1] <= _MOST_TAPS  # what does not fit torch refuses, in its own words


class _KeepsLayout:
    """A pooling of torch's, which treats image and channel alike, so that it also keeps the batch innermost.

    torch's kernels know two layouts and turn every other into NCHW. With the two outer dimensions exchanged, images that lie batch
    innermost lie channels_last.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_symbolic(input):
            return called(self, input)
        if not looked_through() and input.dim() == 4 and is_batch_innermost(input):
            return super().forward(input.transpose(0, 1)).transpose(0, 1)
        return super().forward(input)


class AvgPool2d(_KeepsLayout, nn.AvgPool2d):
    """``nn.AvgPool2d``, batch innermost out where it was batch innermost in."""


class AdaptiveAvgPool2d(_KeepsLayout, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d``, batch innermost out where it was batch innermost in."""
