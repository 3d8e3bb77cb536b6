"""The typed entry to the operations: checks, autocast, and the argument order of torch.nn.functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_sparse.formats import CsrIndices, block_grid
from grasp_sparse.ops.differentiable import call
from grasp_sparse.ops.dtypes import autocast_dtype

_COMPUTE = (torch.float32, torch.float64)


def csr_linear(x: Tensor, values: Tensor, indices: CsrIndices, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y = x Wᵀ + b with a sparse W, or max(y, 0).

    Args:
        x: ``[..., in_features]``.
        values: ``[1, nnz]``, in the order of ``indices``.
        bias: ``[out_features]`` or None.
        relu: whether a ReLU is applied on the way out, which costs nothing there.

    Returns:
        ``[..., out_features]``; under autocast in the autocast dtype. bfloat16 is read and written as such and computed in
        float32, and so is float16 on CUDA; on the CPU it goes through float32.

    Raises:
        ValueError: the last dimension of x is not in_features, or the dtypes differ.
    """
    rows, cols = indices.shape
    _check_features(x, cols)
    (x, values, bias), result = _compute_dtype(x, values, bias)
    flat = _rows(x)
    y = call("csr_spmm", values, *indices, bias, flat, relu)
    if x.dim() != 2:
        y = y.reshape(*x.shape[:-1], rows)
    return y if y.dtype == result else y.to(result)


def bsr_linear(
    x: Tensor, values: Tensor, indices: CsrIndices, weight_shape: Sequence[int], bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """:func:`csr_linear` with a W of whole blocks.

    Args:
        values: ``[nblocks, bh, bw]``, in the order of ``indices``, which are those of the grid of blocks.
        weight_shape: (out_features, in_features), which a grid of blocks does not tell.

    Raises:
        ValueError: as there, or the grid is not that of the weight.
    """
    rows, cols = weight_shape
    _check_grid(values, indices, weight_shape)
    _check_features(x, cols)
    (x, values, bias), result = _compute_dtype(x, values, bias)
    flat = _rows(x)
    y = call("bsr_spmm", values, *indices, bias, flat, rows, relu)
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
        ``[N, out_channels, H', W']``; dtypes as :func:`csr_linear`.

    Raises:
        ValueError: wrong rank or channels, a window that does not fit into the padded image, or dtypes that differ.
    """
    channels = indices.shape[1] // (kernel_size[0] * kernel_size[1])
    _check_images(x, channels, kernel_size, padding, dilation)
    (x, values, bias), result = _compute_dtype(x, values, bias)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = call(
        "csr_conv2d_fprop", values, *indices, bias, batched, list(kernel_size), list(stride), list(padding), list(dilation)
    )
    if x.dim() == 3:
        y = y.squeeze(0)
    return y if y.dtype == result else y.to(result)


def csr_conv2d_batch_norm(
    x: Tensor,
    values: Tensor,
    indices: CsrIndices,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    relu: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`csr_conv2d` and behind it batch norm by the statistics of the batch, plus ``residual`` if given, then ReLU if ``relu``.

    There are kernels for the CPU; elsewhere it runs on the reference, which makes the weight dense.

    Args:
        x: ``[N, in_channels, H, W]``.
        residual: of the shape and dtype of the result, or None.
        norm_weight, norm_bias: ``[out_channels]`` or None.

    Returns:
        The result, and mean and (biased) variance ``[out_channels]`` of what the convolution gave.

    Raises:
        ValueError: as there, or x without a batch.
        RuntimeError: residual, norm_weight or norm_bias do not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"Expected x of shape [N, C, H, W], got {tuple(x.shape)}.")
    channels = indices.shape[1] // (kernel_size[0] * kernel_size[1])
    _check_images(x, channels, kernel_size, padding, dilation)
    (x, values, bias), result = _compute_dtype(x, values, bias)
    window = (list(kernel_size), list(stride), list(padding), list(dilation))
    affine = (norm_weight, norm_bias)
    if residual is not None and residual.dtype == result:
        residual = residual.to(x.dtype)
    y, _, mean, var = call("csr_conv2d_norm_train", values, *indices, bias, x, residual, *affine, eps, relu, *window)
    return y if y.dtype == result else y.to(result), mean, var


def bsr_conv2d(
    x: Tensor,
    values: Tensor,
    indices: CsrIndices,
    weight_shape: Sequence[int],
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    """:func:`csr_conv2d` with filters of whole blocks, or max(y, 0).

    Args:
        values: ``[nblocks, bh, bw]``, a block being one tap of the filters and bw neighbouring channels; in the order of
            ``indices``, which are those of the grid of blocks.
        weight_shape: (out_channels, in_channels, kh, kw), which a grid of blocks does not tell.

    Raises:
        ValueError: as there, or the grid is not that of the weight.
    """
    out_channels, channels, *kernel_size = weight_shape
    _check_grid(values, indices, weight_shape)
    _check_images(x, channels, kernel_size, padding, dilation)
    (x, values, bias), result = _compute_dtype(x, values, bias)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = call(
        "bsr_conv2d_fprop", values, *indices, bias, batched, out_channels, kernel_size, list(stride), list(padding), list(dilation),
        relu,
    )  # fmt: skip
    if x.dim() == 3:
        y = y.squeeze(0)
    return y if y.dtype == result else y.to(result)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix, also where it has no features: reshape(-1, 0) would not know how many rows."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _check_features(x: Tensor, features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"Expected x of shape [..., {features}], got {tuple(x.shape)}.")


def _check_images(x: Tensor, channels: int, kernel_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"Expected x of shape [N, {channels}, H, W] or [{channels}, H, W], got {tuple(x.shape)}.")
    for axis, size in enumerate(x.shape[-2:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        if padded < reach:
            raise ValueError(f"Expected a padded image of at least {reach} along dimension {axis - 2}, got {padded}.")


def _check_grid(values: Tensor, indices: CsrIndices, weight_shape: Sequence[int]) -> None:
    if values.dim() != 3:
        raise ValueError(f"Expected values of shape [nblocks, bh, bw], got {list(values.shape)}.")
    grid = block_grid(weight_shape, values.shape[1:])
    if indices.shape != grid:
        raise ValueError(
            f"Expected indices of a {list(grid)} grid of blocks for a weight {list(weight_shape)}, got {list(indices.shape)}."
        )


def _compute_dtype(x: Tensor, values: Tensor, bias: Tensor | None):
    """Casts to what the kernels take and names the dtype the result must have.

    They compute in the dtype of the values, float32 or float64; x has it too, or is bfloat16 (on CUDA float16 as well) beside
    float32.

    Done here rather than with register_autocast, whose dtype is fixed at registration and which does not see float64.
    """
    dtype, wanted = x.dtype, autocast_dtype(x)
    if wanted is None and dtype in _COMPUTE and values.dtype == dtype and (bias is None or bias.dtype == dtype):
        return (x, values, bias), dtype  # by far the most calls, of which a small layer's take no longer than what follows
    if wanted is not None:
        result = wanted
    elif any(t is not None and t.dtype != x.dtype for t in (values, bias)):
        got = ", ".join(str(t.dtype) for t in (x, values, bias) if t is not None)
        raise ValueError(f"Expected x, values and bias of one dtype, got {got}; convert with .to() or use autocast.")
    else:
        result = x.dtype
    compute = x.dtype if x.dtype in _COMPUTE and x.dtype == values.dtype else torch.float32
    halves = (torch.bfloat16, torch.float16) if x.is_cuda else (torch.bfloat16,)
    storage = result if result in halves else compute
    cast = ((x, storage), (values, compute), (bias, compute))
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t, dtype in cast), result
