"""Inputs for the tests of the operations: index packs, layouts, windows, and dense formulas that share no code with ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_sparse.formats import CsrIndices, block_grid, csr_from_mask, gather_blocks
from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.schema import BLOCK_SCHEMAS, SCHEMAS

COMPILED = torch._C._dispatch_has_kernel_for_dispatch_key("grasp_sparse::csr_spmm", "CPU")

BATCHES = (0, 1, 3, 17, 33)
DENSITIES = (0.0, 0.1, 1.0)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
STORED = {**DTYPES, "bfloat16": torch.bfloat16}  # of activations; values beside bfloat16 are float32
TOLERANCE = {
    torch.bfloat16: dict(rtol=8e-3, atol=1e-3),  # one rounding to 8 bits, at the end
    torch.float16: dict(rtol=1e-3, atol=1e-3),  # to 11 bits
    torch.float32: dict(rtol=1e-4, atol=1e-4),
    torch.float64: dict(rtol=1e-10, atol=1e-10),
}

# Below, at and above what kernels take at once; even and not.
BLOCK_SIZES = ((1, 1), (1, 4), (4, 1), (2, 3), (4, 4), (5, 7), (8, 8), (9, 2), (16, 16), (20, 13), (32, 8), (64, 64))

WINDOWS = {  # kernel, stride, padding (top, bottom, left, right), dilation, image
    "1x1": ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), (7, 5)),
    "1x1-whole-vectors": ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), (12, 16)),  # pixels are lanes in NCHW, read in place
    "1x1-pixels-left-over": ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), (7, 19)),
    "1x1-stride2": ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), (7, 6)),
    "1x1-stride2-wide": ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), (5, 21)),
    "3x3": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (8, 8)),
    "3x3-valid": ((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), (5, 9)),
    "3x3-stride2": ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (9, 8)),
    "3x3-stride12-wide": ((3, 3), (1, 2), (1, 1, 1, 1), (1, 1), (5, 19)),
    "3x3-stride3-unseen-rest": ((3, 3), (3, 3), (0, 0, 0, 0), (1, 1), (8, 10)),
    "3x3-dilation2": ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), (6, 7)),
    "3x3-stride2-dilation2": ((3, 3), (2, 2), (1, 1, 1, 1), (2, 2), (7, 8)),
    "2x3-stride21-same": ((2, 3), (2, 1), (0, 1, 1, 1), (1, 1), (6, 5)),
    "4x4-same": ((4, 4), (1, 1), (1, 2, 1, 2), (1, 1), (5, 6)),
    "5x1-dilation21": ((5, 1), (1, 1), (4, 4, 0, 0), (2, 1), (4, 3)),
    "3x3-on-1x1": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (1, 1)),
    "3x3-on-1x40": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (1, 40)),
    "padding-beyond-kernel": ((2, 2), (1, 1), (3, 0, 0, 3), (1, 1), (2, 2)),
}


def sparse_matrix(rows: int, cols: int, density: float, dtype=torch.float64) -> tuple[Tensor, CsrIndices, Tensor]:
    """values [1, nnz], indices and the bool mask; between the extremes one row and one column are empty."""
    mask = torch.rand(rows, cols) < density
    if 0 < density < 1:
        mask[rows // 2] = False
        mask[:, cols // 3] = False
    return torch.randn(1, int(mask.sum()), dtype=dtype), csr_from_mask(mask), mask


def block_matrix(
    weight_shape, block_size, density: float, dtype=torch.float64, past: float | None = None
) -> tuple[Tensor, CsrIndices]:
    """values [nblocks, bh, bw] and the indices of the blocks; where a block reaches past the weight it holds numbers as well,
    or ``past``."""
    indices = csr_from_mask(torch.rand(block_grid(weight_shape, block_size)) < density)
    values = torch.randn(indices.nnz, *block_size, dtype=dtype)
    if past is not None:
        values[gather_blocks(torch.ones(weight_shape), indices, block_size) == 0] = past
    return values, indices


def dense_matrix(values: Tensor, mask: Tensor) -> Tensor:
    """The weight by masked assignment: what values in mask order mean."""
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Convolution as a sum over the kernel's places of products of shifted images; differentiable, any batch."""
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    kh, kw = weight.shape[2:]
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = x.new_zeros(x.shape[0], weight.shape[0], height, width)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            cols = slice(j * dilation[1], j * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            y = y + torch.einsum("oi,nihw->nohw", weight[:, :, i, j], x[:, :, rows, cols])
    return y if bias is None else y + bias[:, None, None]


def is_chwn(x: Tensor) -> bool:
    return x.permute(1, 2, 3, 0).is_contiguous()


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


# name -> (put a tensor into the layout, does a result have the promised layout)
IMAGE_LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], bool]]] = {
    "NCHW": (Tensor.contiguous, Tensor.is_contiguous),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), is_channels_last),
    "CHWN": (lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), is_chwn),
    "sliced": (lambda x: F.pad(x, (1, 2, 0, 1))[:, :, : x.shape[2], 1 : 1 + x.shape[3]], Tensor.is_contiguous),
    "every-other": (lambda x: torch.stack((x, x + 1), -1).flatten(3)[..., ::2], Tensor.is_contiguous),
    "transposed": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), Tensor.is_contiguous),
}
ROW_LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], bool]]] = {
    "row-major": (Tensor.contiguous, Tensor.is_contiguous),
    "feature-major": (lambda x: x.t().contiguous().t(), lambda x: x.t().is_contiguous()),
    "sliced": (lambda x: F.pad(x, (1, 2))[:, 1 : 1 + x.shape[1]], Tensor.is_contiguous),
    "every-other-row": (lambda x: torch.stack((x, x + 1), 1).flatten(0, 1)[::2], Tensor.is_contiguous),
    "every-other-feature": (lambda x: torch.stack((x, x + 1), 2).flatten(1)[:, ::2], Tensor.is_contiguous),
}


def same_layout_or_ambiguous(x: Tensor, y: Tensor, promised: Callable[[Tensor], bool]) -> bool:
    """Whether y has the promised layout; an x that is plainly contiguous as well (size-1 dimensions) may give that."""
    return promised(y) or (x.is_contiguous() and y.is_contiguous())


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to a float64 expectation up to the rounding of the actual dtype."""
    tolerance = TOLERANCE[actual.dtype]
    actual, expected = actual.double(), expected.double()
    if actual.shape == expected.shape and torch.allclose(actual, expected, **tolerance):
        return  # assert_close, which says what differs, takes ten times as long to find that nothing does
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{what}: {text}")


def examples(dtype=torch.float64) -> dict[str, tuple]:
    """A small call of every operation on activations of this dtype, all arguments that can be differentiated asking for it.

    And of its variants: :func:`operation` knows whose they are.
    """

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    compute = compute_dtype(dtype)
    values, indices, _ = sparse_matrix(4, 5, 0.5, compute)
    filter_values, filter_indices, _ = sparse_matrix(3, 12, 0.5, compute)
    values.requires_grad_(), filter_values.requires_grad_()
    window = ([3, 2], [2, 1], [1, 2, 0, 1], [1, 2])  # kernel, stride, padding, dilation; image 5x4 -> 3x3
    images, grads = leaf(2, 2, 5, 4), leaf(2, 3, 3, 3)
    blocks, block_indices = block_matrix((4, 5), (3, 2), 0.8, compute)
    filter_blocks, filter_block_indices = block_matrix((3, 5, 3, 2), (2, 2), 0.5, compute)
    blocks.requires_grad_(), filter_blocks.requires_grad_()
    wide = leaf(2, 5, 5, 4)
    return {
        "csr_spmm": (values, *indices, leaf(4, dtype=compute), leaf(3, 5)),
        "csr_spmm_t": (values, *indices, leaf(3, 4)),
        "csr_sddmm": (*indices, leaf(3, 4), leaf(3, 5)),
        "csr_spmm_backward": (values, *indices, leaf(3, 4), leaf(3, 5)),
        "csr_spmm, relu": (values, *indices, leaf(4, dtype=compute), leaf(3, 5), True),
        "csr_spmm_backward, relu": (values, *indices, leaf(3, 4), leaf(3, 5), leaf(3, 4).detach()),
        "csr_spmm_backward, no input gradient": (values, *indices, leaf(3, 4), leaf(3, 5), leaf(3, 4).detach(), False),
        "csr_conv2d_fprop": (filter_values, *filter_indices, leaf(3, dtype=compute), images, *window),
        "csr_conv2d_dgrad": (filter_values, *filter_indices, grads, [5, 4], *window),
        "csr_conv2d_wgrad": (*filter_indices, grads, images, *window),
        "csr_conv2d_backward": (filter_values, *filter_indices, grads, images, *window),
        "bsr_spmm": (blocks, *block_indices, leaf(4, dtype=compute), leaf(3, 5), 4),
        "bsr_spmm, relu": (blocks, *block_indices, leaf(4, dtype=compute), leaf(3, 5), 4, True),
        "bsr_spmm_t": (blocks, *block_indices, leaf(3, 4), 5),
        "bsr_sddmm": (*block_indices, leaf(3, 4), leaf(3, 5), [3, 2]),
        "bsr_conv2d_fprop": (filter_blocks, *filter_block_indices, leaf(3, dtype=compute), wide, 3, *window),
        "bsr_conv2d_fprop, relu": (filter_blocks, *filter_block_indices, leaf(3, dtype=compute), wide, 3, *window, True),
        "bsr_conv2d_dgrad": (filter_blocks, *filter_block_indices, grads, 5, [5, 4], *window),
        "bsr_conv2d_wgrad": (*filter_block_indices, grads, wide, [2, 2], *window),
    }


OPERATIONS = (*SCHEMAS, *BLOCK_SCHEMAS)
VARIANTS = ("csr_spmm, relu", "csr_spmm_backward, relu", "csr_spmm_backward, no input gradient", "bsr_spmm, relu", "bsr_conv2d_fprop, relu")
CALLS = (*OPERATIONS, *VARIANTS)  # of examples()


def operation(call: str):
    return getattr(torch.ops.grasp_sparse, call.partition(",")[0])


NORM_CASES = [(residual, relu, affine) for residual in (False, True) for relu in (False, True) for affine in (True, False)]


def norm_inputs(shape, residual: bool, affine: bool, dtype=torch.float64, mean: float = 0.0) -> tuple[Tensor | None, ...]:
    """x, residual, weight, bias of batch_norm_train, None where left out; some weights are negative, one is zero."""
    channels = shape[1]
    spread = torch.linspace(0.5, 3.0, channels, dtype=dtype)[:, None, None]
    x = torch.randn(shape, dtype=dtype) * spread + mean
    weight = torch.linspace(-1.0, 1.0, channels, dtype=dtype) if affine else None
    return x, torch.randn(shape, dtype=dtype) if residual else None, weight, torch.randn(channels, dtype=dtype) if affine else None
