"""One test for each way in which an earlier sparse training library is known to fail."""

from __future__ import annotations

import pytest
import torch
from op_cases import close, dense_conv, dense_matrix, sparse_matrix
from torch import nn

from grasp_sparse.formats import csr_from_mask
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.ops import csr_conv2d, csr_linear


def _conv(kernel=(3, 3), **window):
    dense = nn.Conv2d(4, 6, kernel, **window)
    return dense, SparseConv2d.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))


@pytest.mark.parametrize("batch", [1, 2, 7, 9, 15, 31])
def test_batch_need_not_be_a_multiple_of_the_lanes(batch):
    values, indices, mask = sparse_matrix(10, 30, 0.3, torch.float32)
    x = torch.randn(batch, 30)
    close(csr_linear(x, values, indices), x.double() @ dense_matrix(values, mask).double().t())
    dense, sparse = _conv(padding=1)
    x = torch.randn(batch, 4, 5, 5)
    close(sparse(x), dense(x))


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean], ids=["sum", "mean"])
def test_gradient_of_a_reduction(reduce):
    """The gradient of a sum arrives expanded, with all strides zero."""
    dense, sparse = _conv(padding=1)
    x = torch.randn(9, 4, 5, 5)
    for layer in (dense, sparse):
        reduce(layer(x)).backward()
    close(sparse.values.grad.view(-1), dense.weight.grad.view(-1))
    close(sparse.bias.grad, dense.bias.grad)


def test_channels_last():
    dense, sparse = _conv(padding=1)
    x = torch.randn(9, 4, 5, 5).to(memory_format=torch.channels_last)
    y = sparse(x)
    close(y, dense(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_groups_are_refused():
    dense = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="one group, got 2"):
        SparseConv2d.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))


def test_input_that_is_not_contiguous():
    dense, sparse = _conv()
    x = torch.randn(9, 4, 12, 12)
    for view in (x[:, :, ::2, 1:], x[::2], x.transpose(2, 3), x.flip(0).narrow(2, 3, 5)):
        close(sparse(view), dense(view))


def test_more_than_two_million_weights():
    dense = nn.Linear(1500, 1500, bias=False)
    sparse = SparseLinear.from_dense(dense, torch.ones(1500, 1500, dtype=torch.bool))
    assert sparse.nnz > 2_000_000
    x = torch.randn(3, 1500, requires_grad=True)
    close(sparse(x), dense(x))
    sparse(x).sum().backward()
    close(x.grad, dense.weight.sum(0).expand(3, -1))
    close(sparse.values.grad.view(1500, 1500), x.sum(0).expand(1500, -1))


@pytest.mark.parametrize("kernel", [(2, 3), (3, 2), (5, 1), (1, 4)], ids=str)
def test_rectangular_kernels(kernel):
    dense, sparse = _conv(kernel, padding=(1, 2))
    x = torch.randn(5, 4, 8, 7)
    for layer in (dense, sparse):
        layer(x).square().sum().backward()
    close(sparse(x), dense(x))
    close(sparse.values.grad.view(-1) / 100, dense.weight.grad.view(-1) / 100)


@pytest.mark.parametrize("dilation", [2, (1, 3)], ids=str)
def test_dilation(dilation):
    dense, sparse = _conv(dilation=dilation, padding=1)
    x = torch.randn(5, 4, 9, 9)
    assert sparse(x).shape == dense(x).shape
    close(sparse(x), dense(x))


def test_more_than_32767_weights_in_one_output_channel():
    channels = 3700
    mask = torch.ones(2, channels * 9, dtype=torch.bool)
    mask[1, ::7] = False
    indices = csr_from_mask(mask)
    assert int(indices.crow_indices[1]) > 32767
    values, x = torch.randn(1, indices.nnz), torch.randn(2, channels, 3, 3)
    y = csr_conv2d(x, values, indices, None, (3, 3))
    weight = dense_matrix(values.double(), mask).view(2, channels, 3, 3)
    torch.testing.assert_close(y.double(), dense_conv(x.double(), weight, None, (1, 1), (0, 0, 0, 0), (1, 1)), rtol=1e-4, atol=1e-2)


def test_float64_is_computed_in_float64():
    values, indices, mask = sparse_matrix(10, 30, 0.5)
    x = torch.randn(9, 30, dtype=torch.float64)
    y = csr_linear(x, values, indices)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ dense_matrix(values, mask).t(), rtol=1e-13, atol=1e-13)


def test_state_dict_carries_the_indices():
    dense = nn.Linear(30, 10)
    sparse, other = (SparseLinear.from_dense(dense, (torch.randperm(300) < 90).view(10, 30)) for _ in range(2))
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(4, 30)
    assert torch.equal(other(x), sparse(x))
