"""Layout in = layout out: the rule that fakes, reference and compiled kernels share.

A tensor that is contiguous in several layouts at once counts as the first of: NCHW, channels_last, batch-innermost. Images of one
channel are the exception: there the stride of the channel says what was meant, as it does to torch, 1 for channels_last (what
``to(memory_format=…)`` sets). Anything else (slices, expanded gradients) gives an NCHW result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHWN = (1, 2, 3, 0)  # NCHW dimensions in the order in which they lie in memory, batch innermost
_CHWN_BACK = (3, 0, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether the 4-D ``x`` counts as channels_last."""
    if not x.is_contiguous():
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.numel() > 0 and x.shape[1] == 1 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def is_batch_innermost(x: Tensor) -> bool:
    """Whether the 4-D ``x`` has CHWN strides, and is contiguous in no layout that goes before."""
    plainly = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return not plainly and x.permute(_CHWN).is_contiguous()


def empty_rows(like: Tensor, size: Sequence[int]) -> Tensor:
    """Empty ``[N, features]``, feature-major (batch innermost) if ``like [N, other]`` is."""
    if not like.is_contiguous() and like.t().is_contiguous():
        return like.new_empty(tuple(reversed(size))).t()
    return like.new_empty(tuple(size))


def empty_images(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Empty ``[N, C, H, W]`` in the memory layout of the 4-D ``like``, and in its dtype unless another is given."""
    dtype = dtype or like.dtype
    if is_channels_last(like):
        return torch.empty(tuple(size), dtype=dtype, device=like.device, memory_format=torch.channels_last)
    if not like.is_contiguous() and like.permute(_CHWN).is_contiguous():
        return like.new_empty([size[d] for d in _CHWN], dtype=dtype).permute(_CHWN_BACK)
    return like.new_empty(tuple(size), dtype=dtype)


def output_size(
    input_size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width after a convolution; padding is (top, bottom, left, right)."""
    height = (input_size[0] + padding[0] + padding[1] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    width = (input_size[1] + padding[2] + padding[3] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    return height, width


def pooled_size(
    input_size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int]:  # fmt: skip
    """Height and width after pooling; padding is (height, width). With ``ceil_mode`` no window begins in the padding behind."""
    sizes = []
    for size, kernel, step, pad, spread in zip(input_size, kernel_size, stride, padding, dilation, strict=True):
        room = size + 2 * pad - spread * (kernel - 1) - 1
        count = (room + step - 1 if ceil_mode else room) // step + 1
        sizes.append(count - 1 if ceil_mode and (count - 1) * step >= size + pad else count)
    return sizes[0], sizes[1]
