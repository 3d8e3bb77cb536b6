"""Linear layers on torch's compressed tensors: three products, and what a change of the values does to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.compressed import CompressedLinear, CsrLinearByHand, csr_from, sample_csr

KEPT = torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.3


def _dense_products(weight: Tensor, layout: torch.layout) -> CompressedLinear:
    """By dense products, which torch has for any layout on any device."""

    def sample(like: Tensor, left: Tensor, right: Tensor) -> Tensor:
        full = left @ right
        return full.to_sparse_csr() if layout == torch.sparse_csr else full.to_sparse_bsr((8, 4))

    compressed = weight.to_sparse_csr() if layout == torch.sparse_csr else weight.to_sparse_bsr((8, 4))
    return CompressedLinear(compressed, lambda matrix, columns: matrix.to_dense() @ columns, sample)


def _weight(blocks: bool) -> Tensor:
    weight = torch.randn(24, 40)
    if not blocks:
        return weight * KEPT
    return weight * torch.rand(3, 10, generator=torch.Generator().manual_seed(0)).lt(0.4).repeat_interleave(8, 0).repeat_interleave(4, 1)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_transpose_follows_the_values(blocks: bool) -> None:
    weight = _weight(blocks)
    weight[:8], weight[:, :4] = 0, 0  # rows and columns of which nothing is kept
    layer = _dense_products(weight, torch.sparse_bsr if blocks else torch.sparse_csr)
    grad = torch.randn(24, 6)
    torch.testing.assert_close(layer.input_gradient(grad), weight.t() @ grad)
    layer.weight.values().mul_(3)
    torch.testing.assert_close(layer.input_gradient(grad), 3 * weight.t() @ grad)
    torch.testing.assert_close(layer.output(weight.t().contiguous()), 3 * weight @ weight.t())
    x = torch.randn(40, 6)
    torch.testing.assert_close(layer.weight_gradient(grad, x).to_dense(), grad @ x.t())


def test_products_of_csr() -> None:
    weight, x, grad = _weight(False), torch.randn(40, 6), torch.randn(24, 6)
    layer = CompressedLinear(csr_from(weight), torch.sparse.mm, sample_csr)
    assert layer.weight.col_indices().dtype == torch.int32
    torch.testing.assert_close(layer.output(x), weight @ x)
    torch.testing.assert_close(layer.input_gradient(grad), weight.t() @ grad)
    found = layer.weight_gradient(grad, x)
    assert found.col_indices().dtype == torch.int32
    torch.testing.assert_close(found.to_dense(), grad @ x.t() * KEPT)
    assert torch.equal(layer.weight.to_dense(), weight)  # not written into


def test_a_layer_trains() -> None:
    """The optimizer changes `values`, and the products see it."""
    linear = nn.Linear(40, 24)
    with torch.no_grad():
        linear.weight.mul_(KEPT)
    layer, x = CsrLinearByHand(linear), torch.randn(40, 6)
    dense = nn.Linear(40, 24)
    dense.load_state_dict(linear.state_dict())
    for _ in range(3):
        for model, given in ((layer, x), (dense, x.t())):
            model.zero_grad()
            model(given).square().sum().backward()
        dense.weight.grad.mul_(KEPT)
        with torch.no_grad():
            for parameter in (*layer.parameters(), *dense.parameters()):
                parameter.sub_(parameter.grad, alpha=1e-3)
    torch.testing.assert_close(layer(x).t(), dense(x.t()))
    torch.testing.assert_close(layer.values.detach(), dense.weight.detach()[KEPT])
