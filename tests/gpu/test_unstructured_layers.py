"""Layers of unstructured weights on a device: a step equals that of the dense layer whose weight is masked."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import TOLERANCE
from torch import nn

from grasp_sparse.nn import SparseConv2d, SparseLinear

pytestmark = pytest.mark.gpu

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYERS = {
    "linear": (nn.Linear(96, 70), SparseLinear.from_dense, (50, 96)),
    "conv": (nn.Conv2d(12, 20, 3, 2, 1), SparseConv2d.from_dense, (9, 12, 11, 14)),
}


@pytest.mark.parametrize("dense, make, shape", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", AUTOCAST.values(), ids=AUTOCAST)
def test_a_step_equals_that_of_the_masked_dense_layer(dtype, dense, make, shape):
    dense = copy.deepcopy(dense)
    mask = torch.rand_like(dense.weight) < 0.1
    sparse = make(copy.deepcopy(dense), mask).cuda()
    with torch.no_grad():
        dense.weight.mul_(mask)
    x = torch.randn(shape).to(dtype or torch.float32)
    inputs = x.cuda().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
        y = sparse(inputs[0])
    wanted = dense.double()(inputs[1])
    assert y.dtype == x.dtype
    g = torch.randn(y.shape).to(y.dtype)
    y.backward(g.cuda())
    wanted.backward(g.double())
    tolerance = TOLERANCE[y.dtype]
    for got, want in (
        (y, wanted),
        (inputs[0].grad, inputs[1].grad),
        (sparse.values.grad, dense.weight.grad[mask].unsqueeze(0)),
        (sparse.bias.grad, dense.bias.grad),
    ):
        torch.testing.assert_close(got.detach().double().cpu(), want.detach(), **tolerance)
