"""Which calls of the operations Triton's kernels take; the others go to the reference, which computes or refuses them."""

from __future__ import annotations

import functools

import torch

from grasp_sparse.ops import reference_blocks
from grasp_sparse.ops.reference import without_autocast
from grasp_sparse.ops.triton import conv2d, linear, why_not

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FAMILIES = {  # the kernels, and where among the arguments the activations stand
    "bsr_spmm": (linear.bsr_spmm, (7,)),
    "bsr_spmm_t": (linear.bsr_spmm_t, (6,)),
    "bsr_sddmm": (linear.bsr_sddmm, (5, 6)),
    "bsr_conv2d_fprop": (conv2d.bsr_conv2d_fprop, (7,)),
    "bsr_conv2d_dgrad": (conv2d.bsr_conv2d_dgrad, (6,)),
    "bsr_conv2d_wgrad": (conv2d.bsr_conv2d_wgrad, (5, 6)),
}


def run(name: str, *arguments):
    """The operation ``name`` on CUDA tensors."""
    kernel, at = _FAMILIES[name]
    activations = [arguments[i] for i in at]
    block_size, indices = (arguments[7], arguments[:5]) if len(at) == 2 else (arguments[0].shape[1:], arguments[1:6])
    dtypes = {activation.dtype for activation in activations}
    if (
        len(dtypes) == 1
        and dtypes <= set(_DTYPES)
        and why_not(block_size) is None
        and all(index.dtype == torch.int32 and index.is_contiguous() for index in indices)
        and len({argument.device for argument in arguments if isinstance(argument, torch.Tensor)}) == 1
        and _has_tensor_cores(activations[0].device)
    ):
        return kernel(*arguments)
    return without_autocast(getattr(reference_blocks, name))(*arguments)


@functools.cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Of all the dtypes: compute capability 8.0."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
