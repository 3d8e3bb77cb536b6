"""Where the kernels that keep a layout run: what norm and pooling ask before they call one."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from grasp_sparse import _extension
from grasp_sparse.ops.layout import is_batch_innermost

_STATUS = _extension.status()
_ON_CPU, _ON_CUDA = _STATUS.loaded, _STATUS.cuda_reason is None
_CUDA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def runs_here(x: Tensor, cpu: Collection[torch.dtype]) -> bool:
    """Whether a compiled kernel takes ``x``, a batch of images: on the CPU in any layout and the dtypes ``cpu``; on CUDA where it lies
    batch innermost, in all that activations are stored in (torch's own kernels serve the other layouts)."""
    if x.is_cuda:
        return _ON_CUDA and x.dtype in _CUDA_DTYPES and x.dim() == 4 and is_batch_innermost(x)
    return _ON_CPU and x.device.type == "cpu" and x.dtype in cpu
