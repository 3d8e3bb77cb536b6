"""torch.func's transforms of operations and of layers: the derivatives of autograd, or a refusal; never zeros without a word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from differentiable_cases import CASES, call_of
from op_cases import sparse_matrix
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import grasp_sparse as gs
from grasp_sparse.ops import csr_linear, differentiable

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def _scalar_function(case: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """One of what the operation differentiates, with a gradient that differs from place to place; and where to take it."""
    name, inputs = call_of(case)
    places = [i for i, a in enumerate(inputs) if isinstance(a, Tensor) and a.requires_grad]
    torch.manual_seed(1)
    y = differentiable.call(name, *inputs)
    weights = [torch.randn_like(t) if t.requires_grad else None for t in ((y,) if isinstance(y, Tensor) else y)]

    def function(*leaves):
        given = list(inputs)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        y = differentiable.call(name, *given)
        results = (y,) if isinstance(y, Tensor) else y
        return sum((t * weight).sin().sum() for t, weight in zip(results, weights, strict=True) if weight is not None)

    return function, tuple(inputs[place].detach() for place in places)


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_of_autograd(case):
    function, leaves = _scalar_function(case)
    wanted = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    first = torch.autograd.grad(function(*wanted), wanted, create_graph=True)
    got = grad(function, argnums=tuple(range(len(leaves))))(*leaves)
    for a, b in zip(got, first, strict=True):
        torch.testing.assert_close(a, b.detach())

    def of_gradients(*leaves):
        return sum(g.square().sum() for g in grad(function, argnums=tuple(range(len(leaves))))(*leaves))

    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, materialize_grads=True)
    got = grad(of_gradients, argnums=tuple(range(len(leaves))))(*leaves)
    assert any(g.abs().sum() > 0 for g in second)
    for a, b in zip(got, second, strict=True):
        torch.testing.assert_close(a, b)


def _with_tangents(function, leaves):
    with forward_ad.dual_level():
        return function(*(forward_ad.make_dual(leaf, leaf) for leaf in leaves))


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_is_refused(case):
    function, leaves = _scalar_function(case)
    for transform in (
        lambda: jvp(function, leaves, leaves),
        lambda: jacfwd(function)(*leaves),
        lambda: hessian(function)(*leaves),
        lambda: linearize(function, *leaves),
        lambda: _with_tangents(function, leaves),
    ):
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with grad_mode(), pytest.raises(NotImplementedError, match=r"Expected reverse mode .*, got forward mode .*jacrev"):
                transform()


def _layer(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind.endswith("conv"):
        dense, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(5, 4, 6, 7)
    else:
        dense, x = nn.Linear(8, 6), torch.randn(5, 8)
    mask = torch.rand_like(dense.weight) < 0.4
    name = kind.removeprefix("masked ").capitalize().replace("Conv", "Conv2d")
    layer = getattr(gs.nn, ("Masked" if kind.startswith("masked") else "Sparse") + name).from_dense(dense, mask)
    return layer.double(), x.double()


@pytest.mark.parametrize("kind", ["linear", "conv", "masked linear", "masked conv"])
def test_gradients_of_each_example(kind):
    layer, x = _layer(kind)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().mean()

    got = vmap(grad(loss), in_dims=(None, 0))({name: p.detach() for name, p in parameters.items()}, x)
    for i, example in enumerate(x):
        wanted = torch.autograd.grad(loss(parameters, example), list(parameters.values()))
        for name, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(got[name][i], gradient)


def _linear():
    values, indices, _ = sparse_matrix(6, 8, 0.5)
    return values, indices, torch.randn(5, 8, dtype=torch.float64)


def test_jacobian_hessian_and_product_with_a_vector():
    values, indices, x = _linear()
    weight = csr_linear(torch.eye(8, dtype=torch.float64), values, indices).t()

    def f(x):
        return csr_linear(x, values, indices)

    torch.testing.assert_close(jacrev(f)(x[0]), weight)
    torch.testing.assert_close(jacrev(jacrev(lambda x: f(x).square().sum()))(x[0]), 2 * weight.t() @ weight)
    _, product = vjp(f, x)
    seed = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(product(seed)[0], seed @ weight)


def test_functionalized():
    values, indices, x = _linear()
    torch.testing.assert_close(functionalize(lambda x: csr_linear(x, values, indices))(x), csr_linear(x, values, indices))
