"""Where the kernels that keep a layout run: what norm and pooling ask before they call one; and the ends of a chain of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from grasp_sparse import _extension
from grasp_sparse.ops.differentiable import is_transformed
from grasp_sparse.ops.layout import is_batch_innermost

_STATUS = _extension.status()
_ON_CPU, _ON_CUDA = _STATUS.loaded, _STATUS.cuda_reason is None
_CUDA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def looked_through() -> bool:
    """Whether torch.func or torch.jit.trace looks through the layers, which then run as torch's own. Their operations have rules
    for vmap, which lets nobody ask for a layout, and for forward mode; and a trace must not depend on whether a gradient happens
    to be wanted."""
    return is_transformed() or torch.jit.is_tracing()


def runs_here(x: Tensor, cpu: Collection[torch.dtype]) -> bool:
    """Whether a compiled kernel takes ``x``, a batch of images: on the CPU in any layout and the dtypes ``cpu``; on CUDA where it lies
    batch innermost, in all that activations are stored in (torch's own kernels serve the other layouts)."""
    if x.is_cuda:
        return _ON_CUDA and x.dtype in _CUDA_DTYPES and x.dim() == 4 and is_batch_innermost(x)
    return _ON_CPU and x.device.type == "cpu" and x.dtype in cpu


def batch_innermost(x: Tensor) -> Tensor:
    """``x`` as the CUDA kernels of single weights want images. They turn others in, and the result out; what is turned here stays
    so through everything that keeps a layout, up to the next layer that wants another, and the backward finds it turned."""
    if not (x.is_cuda and _ON_CUDA and x.dim() == 4) or is_batch_innermost(x):
        return x
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """``x`` as tensor cores want images where it lies batch innermost on CUDA, of which cuDNN makes NCHW."""
    if x.is_cuda and x.dim() == 4 and is_batch_innermost(x):
        return x.contiguous(memory_format=torch.channels_last)
    return x
