"""The typed entry to the operations: checks, autocast, and the argument order of torch.nn.functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_sparse.formats import CsrIndices

_COMPUTE = (torch.float32, torch.float64)


def csr_linear(x: Tensor, values: Tensor, indices: CsrIndices, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y = x Wᵀ + b with a sparse W, or max(y, 0).

    Args:
        x: ``[..., in_features]``.
        values: ``[1, nnz]``, in the order of ``indices``.
        bias: ``[out_features]`` or None.
        relu: whether a ReLU is applied on the way out, which costs nothing there.

    Returns:
        ``[..., out_features]``; under autocast in the autocast dtype. bfloat16, and on CUDA float16, is read and written as
        such and computed in float32; on the CPU float16 goes through float32.

    Raises:
        ValueError: the last dimension of x is not in_features, or the dtypes differ.
    """
    rows, cols = indices.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"Expected x of shape [..., {cols}], got {tuple(x.shape)}.")
    (x, values, bias), result = _compute_dtype(x, values, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, cols)
    y = torch.ops.grasp_sparse.csr_spmm(values, *indices, bias, flat, relu)
    if x.dim() != 2:
        y = y.reshape(*x.shape[:-1], rows)
    return y if y.dtype == result else y.to(result)


def csr_conv2d(
    x: Tensor,
    values: Tensor,
    indices: CsrIndices,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """2-D convolution with sparse filters, zero padding (top, bottom, left, right), one group.

    Args:
        x: ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, any layout; the result has the same.
        values: ``[1, nnz]`` of the filters ``[out_channels, in_channels, kh, kw]``.
        bias: ``[out_channels]`` or None.

    Returns:
        ``[N, out_channels, H', W']``; under autocast in the autocast dtype. bfloat16, and on CUDA float16, is read and
        written as such and computed in float32; on the CPU float16 goes through float32.

    Raises:
        ValueError: wrong rank or channels, a window that does not fit into the padded image, or dtypes that differ.
    """
    channels = indices.shape[1] // (kernel_size[0] * kernel_size[1])
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"Expected x of shape [N, {channels}, H, W] or [{channels}, H, W], got {tuple(x.shape)}.")
    for axis, size in enumerate(x.shape[-2:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        if padded < reach:
            raise ValueError(f"Expected a padded image of at least {reach} along dimension {axis - 2}, got {padded}.")
    (x, values, bias), result = _compute_dtype(x, values, bias)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = torch.ops.grasp_sparse.csr_conv2d_fprop(
        values, *indices, bias, batched, list(kernel_size), list(stride), list(padding), list(dilation)
    )
    if x.dim() == 3:
        y = y.squeeze(0)
    return y if y.dtype == result else y.to(result)


def _compute_dtype(x: Tensor, values: Tensor, bias: Tensor | None):
    """Casts to what the kernels take and names the dtype the result must have.

    They compute in the dtype of the values, float32 or float64; x has it too, or is stored in 16 bits beside float32.

    Done here rather than with register_autocast, whose dtype is fixed at registration and which does not see float64.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        result = torch.get_autocast_dtype(device)
    elif any(t is not None and t.dtype != x.dtype for t in (values, bias)):
        got = ", ".join(str(t.dtype) for t in (x, values, bias) if t is not None)
        raise ValueError(f"Expected x, values and bias of one dtype, got {got}; convert with .to() or use autocast.")
    else:
        result = x.dtype
    compute = x.dtype if x.dtype in _COMPUTE and x.dtype == values.dtype else torch.float32
    stored = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,)
    storage = result if result in stored else compute
    wanted = ((x, storage), (values, compute), (bias, compute))
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t, dtype in wanted), result
