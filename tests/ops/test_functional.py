"""The typed entry: ranks, autocast, and errors that say what was expected."""

from __future__ import annotations

import pytest
import torch
from op_cases import close, dense_conv, dense_matrix, sparse_matrix

from grasp_sparse.ops import csr_conv2d, csr_linear


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 0, 8), (0, 8)], ids=str)
def test_linear_takes_any_rank(shape):
    values, indices, mask = sparse_matrix(5, 8, 0.5)
    bias, x = torch.randn(5, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    y = csr_linear(x, values, indices, bias)
    assert y.shape == (*shape[:-1], 5)
    close(y, x @ dense_matrix(values, mask).t() + bias)


def test_conv2d_takes_one_image():
    values, indices, mask = sparse_matrix(5, 18, 0.5)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    y = csr_conv2d(x, values, indices, None, (3, 3))
    close(y, dense_conv(x[None], dense_matrix(values, mask).view(5, 2, 3, 3), None, (1, 1), (0, 0, 0, 0), (1, 1))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    values, indices, _ = sparse_matrix(5, 8, 0.5, torch.float32)
    values, x = values.to(dtype), torch.randn(3, 8).to(dtype)
    y = csr_linear(x, values, indices)
    assert y.dtype == dtype
    assert torch.equal(y, csr_linear(x.float(), values.float(), indices).to(dtype))


def test_autocast_returns_its_dtype_and_float32_gradients():
    values, indices, _ = sparse_matrix(5, 8, 0.5, torch.float32)
    filters, places, _ = sparse_matrix(5, 18, 0.5, torch.float32)
    values.requires_grad_(), filters.requires_grad_()
    x, images = torch.randn(3, 8), torch.randn(3, 2, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = csr_linear(x, values, indices), csr_conv2d(images.bfloat16(), filters, places, None, (3, 3))
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(y, csr_linear(x.bfloat16().float(), values, indices).bfloat16())
    (y.sum() + z.sum()).backward()
    assert (values.grad.dtype, filters.grad.dtype) == (torch.float32, torch.float32)


def test_float64_is_left_alone_by_autocast():
    values, indices, _ = sparse_matrix(5, 8, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert csr_linear(torch.randn(3, 8, dtype=torch.float64), values, indices).dtype == torch.float64


def test_errors_name_expected_and_got():
    values, indices, _ = sparse_matrix(5, 8, 0.5)
    filters, places, _ = sparse_matrix(5, 18, 0.5)
    with pytest.raises(ValueError, match=r"Expected x of shape \[..., 8\], got \(3, 7\)"):
        csr_linear(torch.randn(3, 7), values, indices)
    with pytest.raises(ValueError, match="one dtype, got torch.float32, torch.float64"):
        csr_linear(torch.randn(3, 8), values, indices)
    with pytest.raises(ValueError, match=r"Expected x of shape \[N, 2, H, W\]"):
        csr_conv2d(torch.randn(1, 3, 6, 6).double(), filters, places, None, (3, 3))
    with pytest.raises(ValueError, match=r"Expected x of shape \[N, 2, H, W\]"):
        csr_conv2d(torch.randn(2, 6).double(), filters, places, None, (3, 3))
    with pytest.raises(ValueError, match="padded image of at least 5 along dimension -1, got 4"):
        csr_conv2d(torch.randn(1, 2, 6, 4).double(), filters, places, None, (3, 3), dilation=(2, 2))
