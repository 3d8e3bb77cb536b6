"""One test for each way in which an earlier sparse training library is known to fail."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import close, dense_conv, dense_matrix
from torch import nn

from grasp_sparse.formats import csr_from_mask
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.ops import csr_conv2d


def _conv(kernel=(3, 3), dtype=torch.float32, **window):
    dense = nn.Conv2d(4, 6, kernel, dtype=dtype, **window)
    return dense, SparseConv2d.from_dense(copy.deepcopy(dense), torch.ones_like(dense.weight, dtype=torch.bool))


def _linear(dtype=torch.float32):
    dense = nn.Linear(30, 10, dtype=dtype)
    return dense, SparseLinear.from_dense(copy.deepcopy(dense), torch.ones_like(dense.weight, dtype=torch.bool))


def _agree(dense, sparse, x, reduce):
    """Output and every gradient of ``reduce(output)`` are those of the dense layer, whose mask is all True."""
    found = []
    for layer in (dense, sparse):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        found.append((y, *torch.autograd.grad(reduce(y), [leaf, *layer.parameters()])))
    for got, want in zip(found[1], found[0], strict=True):
        close(got.reshape(want.shape), want)
    return found[1][0]


def _mean_square(y):
    return y.square().mean()


@pytest.mark.parametrize("batch", [1, 2, 7, 9, 15, 31])
def test_batch_need_not_be_a_multiple_of_the_lanes(batch):
    _agree(*_linear(), torch.randn(batch, 30), _mean_square)
    _agree(*_conv(padding=1), torch.randn(batch, 4, 5, 5), _mean_square)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean], ids=["sum", "mean"])
def test_gradient_of_a_reduction(reduce):
    """The gradient of a sum arrives expanded, with all strides zero."""
    _agree(*_linear(), torch.randn(9, 30), reduce)
    _agree(*_conv(padding=1), torch.randn(9, 4, 5, 5), reduce)


def test_channels_last():
    x = torch.randn(9, 4, 5, 5).to(memory_format=torch.channels_last)
    assert _agree(*_conv(padding=1), x, _mean_square).is_contiguous(memory_format=torch.channels_last)


def test_groups_are_refused():
    dense = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="one group, got 2"):
        SparseConv2d.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))


def test_input_that_is_not_contiguous():
    x = torch.randn(9, 4, 12, 12)
    for view in (x[:, :, ::2, 1:], x[::2], x.transpose(2, 3), x.flip(0).narrow(2, 3, 5), x[:, :, :1, :1].expand(x.shape)):
        assert not view.is_contiguous()
        _agree(*_conv(), view, _mean_square)
    x = torch.randn(30, 18)
    for view in (x.t(), x.t()[::2], x[:, :1].t().expand(7, 30)):
        assert not view.is_contiguous() or view.stride(0) == 0
        _agree(*_linear(), view, _mean_square)


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
    _agree(*_conv(kernel, padding=(1, 2)), torch.randn(5, 4, 8, 7), _mean_square)


@pytest.mark.parametrize("dilation", [2, (1, 3)], ids=str)
def test_dilation(dilation):
    dense, sparse = _conv(dilation=dilation, padding=1)
    x = torch.randn(5, 4, 9, 9)
    assert sparse(x).shape == dense(x).shape
    _agree(dense, sparse, x, _mean_square)


def test_more_than_32767_weights_in_one_output_channel():
    channels = 3700
    mask = torch.ones(2, channels * 9, dtype=torch.bool)
    mask[1, ::7] = False
    indices = csr_from_mask(mask)
    assert int(indices.crow_indices[1]) > 32767
    values, x = torch.randn(1, indices.nnz, requires_grad=True), torch.randn(2, channels, 3, 3, requires_grad=True)
    y = csr_conv2d(x, values, indices, None, (3, 3))
    dv, dx = torch.autograd.grad(y.sum(), (values, x))
    weight = dense_matrix(values.detach().double(), mask).view(2, channels, 3, 3)
    expected = dense_conv(x.detach().double(), weight, None, (1, 1), (0, 0, 0, 0), (1, 1))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-2)  # sums of 33300 products
    close(dx, weight.sum(0).expand(x.shape))
    close(dv, x.detach().sum(0).flatten().expand(2, -1)[mask].unsqueeze(0))


@pytest.mark.parametrize("make, shape", [(_linear, (9, 30)), (_conv, (9, 4, 5, 5))], ids=["linear", "conv"])
def test_float64_is_computed_in_float64(make, shape):
    y = _agree(*make(dtype=torch.float64), torch.randn(shape, dtype=torch.float64), _mean_square)  # to 1e-10
    assert y.dtype == torch.float64


def test_state_dict_carries_the_indices():
    linear, conv = nn.Linear(30, 10), nn.Conv2d(4, 6, 3)
    for dense, layer, x in ((linear, SparseLinear, torch.randn(4, 30)), (conv, SparseConv2d, torch.randn(4, 4, 5, 5))):
        masks = [(torch.randperm(dense.weight.numel()) < 90).view_as(dense.weight) for _ in range(2)]
        sparse, other = (layer.from_dense(copy.deepcopy(dense), mask) for mask in masks)
        assert not torch.equal(other(x), sparse(x))
        other.load_state_dict(sparse.state_dict())
        assert torch.equal(other(x), sparse(x))
        assert torch.equal(other.mask, masks[0])
