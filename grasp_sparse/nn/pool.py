"""Max pooling in the layout of its input, with one byte a window kept for the backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from grasp_sparse import _extension

_COMPILED = _extension.status().loaded
_STORED = (torch.float32, torch.float64, torch.bfloat16)
_MOST_TAPS = 255  # a place in the window is one byte


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``: the same results and gradients. On the CPU, in float32, float64 and bfloat16, by kernels that write the
    layout they read. In channels_last torch's own is as fast or faster; that and everything else, indices among it, is left to it.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as ``nn.MaxPool2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        kernel_size, stride, padding, dilation = map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation))
        if not self._supported(input, kernel_size, padding, dilation):
            return super().forward(input)
        return torch.ops.grasp_sparse.max_pool2d(input, kernel_size, stride, padding, dilation, self.ceil_mode)[0]

    def _supported(self, x: Tensor, kernel_size, padding, dilation) -> bool:
        if not _COMPILED or x.device.type != "cpu" or x.dtype not in _STORED or x.dim() != 4 or x.numel() == 0 or self.return_indices:
            return False
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return False
        reaches = [spread * (kernel - 1) + 1 for kernel, spread in zip(kernel_size, dilation, strict=True)]
        fits = all(size + 2 * pad >= reach >= 2 * pad for size, pad, reach in zip(x.shape[2:], padding, reaches, strict=True))
        return fits and kernel_size[0] * kernel_size[1] <= _MOST_TAPS  # what does not fit torch refuses, in its own words
