"""The operations under torch.compile: whole graphs, forward and backward, and batches that change."""

from __future__ import annotations

import pytest
import torch
from op_cases import OPERATIONS, examples, sparse_matrix

from grasp_sparse.ops import csr_conv2d, csr_linear


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_traces(name):
    arguments = examples(torch.float32)[name]
    operation = getattr(torch.ops.grasp_sparse, name)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    expected = operation(*arguments)
    actual = torch.compile(lambda *a: operation(*a), backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(actual, expected)
    results = [(actual, expected)] if isinstance(expected, torch.Tensor) else list(zip(actual, expected, strict=True))
    for result, wanted in results:
        leaf_of = [leaf for leaf in leaves if torch.autograd.grad(wanted.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None]
        seed = torch.randn_like(wanted)
        compiled, eager = (torch.autograd.grad(y, leaf_of, seed, retain_graph=True) for y in (result, wanted))
        for got, want in zip(compiled, eager, strict=True):
            torch.testing.assert_close(got, want)


def _linear():
    values, indices, _ = sparse_matrix(24, 40, 0.2, torch.float32)
    bias = torch.randn(24)
    return values, lambda x, v: csr_linear(x * 2, v, indices, bias).relu(), lambda batch: torch.randn(batch, 40)


def _conv():
    values, indices, _ = sparse_matrix(6, 36, 0.2, torch.float32)
    window = ((3, 3), (2, 1), (1, 1, 0, 1), (1, 1))
    return values, lambda x, v: csr_conv2d(x * 2, v, indices, None, *window).relu(), lambda batch: torch.randn(batch, 4, 9, 8)


FAMILIES = {"linear": _linear, "conv2d": _conv}


def _step(function, x, values):
    x, values = x.detach().requires_grad_(), values.detach().requires_grad_()
    y = function(x, values)
    y.square().sum().backward()
    return y.detach(), x.grad, values.grad


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_inductor(family):
    values, function, batch_of = family()
    x = batch_of(5)
    compiled = torch.compile(function, fullgraph=True)
    for got, want in zip(_step(compiled, x, values), _step(function, x, values), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_one_graph_serves_every_batch(family):
    values, function, batch_of = family()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    _step(compiled, batch_of(5), values)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 7, 33):
            x = batch_of(batch)
            for got, want in zip(_step(compiled, x, values), _step(function, x, values), strict=True):
                torch.testing.assert_close(got, want)
