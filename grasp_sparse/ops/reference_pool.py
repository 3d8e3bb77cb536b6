"""The definition of max pooling with its places in plain torch; see reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_sparse.ops.dense import computed
from grasp_sparse.ops.layout import empty_images, pooled_size
from grasp_sparse.ops.reference import without_autocast
from grasp_sparse.ops.schema import POOL_SCHEMAS

NO_PLACE = 255


def max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode):
    height, width = pooled_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    best = x.new_full((*x.shape[:2], height, width), -torch.inf)
    places = torch.full_like(best, NO_PLACE, dtype=torch.uint8)
    for tap, (rows, cols) in enumerate(_taps(x, x.shape[2:], (height, width), kernel_size, stride, padding, dilation)):
        inside = (rows >= 0)[:, None] & (cols >= 0)
        seen = x[:, :, rows.clamp(min=0)][..., cols.clamp(min=0)]
        better = inside & ((seen > best) | (places == NO_PLACE) | seen.isnan())
        best, places = torch.where(better, seen, best), torch.where(better, tap, places)
    y = empty_images(x, best.shape)
    return y.copy_(best), torch.empty_like(y, dtype=torch.uint8).copy_(places)


def max_pool2d_backward(g, places, input_size, kernel_size, stride, padding, dilation, ceil_mode):
    """Also differentiable, any number of times: it is linear in g."""
    dtype, g = g.dtype, computed(g)
    gx = g.new_zeros(*g.shape[:2], *input_size)
    images, channels = (torch.arange(g.shape[d], device=g.device).view(-1, *(1,) * (3 - d)) for d in (0, 1))
    for tap, (rows, cols) in enumerate(_taps(g, input_size, g.shape[2:], kernel_size, stride, padding, dilation)):
        inside = (rows >= 0)[:, None] & (cols >= 0)
        rows, cols = rows.clamp(min=0), cols.clamp(min=0)
        gx = gx.index_put((images, channels, rows[:, None], cols), torch.where(inside & (places == tap), g, 0), accumulate=True)
    return empty_images(places, gx.shape, dtype).copy_(gx)


def _taps(beside: Tensor, input_size: Sequence[int], output_size: Sequence[int], kernel_size, stride, padding, dilation):
    """For every tap, row by row: the input row of each output row and the input column of each output column, -1 outside."""

    def axis(i: int, tap: int) -> Tensor:
        at = torch.arange(output_size[i], device=beside.device) * stride[i] - padding[i] + tap * dilation[i]
        return torch.where((at >= 0) & (at < input_size[i]), at, -1)

    for r in range(kernel_size[0]):
        for s in range(kernel_size[1]):
            yield axis(0, r), axis(1, s)


_library = torch.library.Library("grasp_sparse", "IMPL")
for _name in POOL_SCHEMAS:
    _library.impl(_name, without_autocast(globals()[_name]), "CompositeExplicitAutograd")
