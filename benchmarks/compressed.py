"""Linear layers on torch's own compressed tensors, CSR or BSR, with the gradients a diligent user would write for it.

torch's autograd makes the gradient of a compressed weight dense. By hand it stays sparse: the input gradient is a product with
the transpose, whose lists are built once and whose values are gathered anew for every step, and the gradient of the weight is
sampled where weights are kept. Activations are columns, ``[features, N]``, which is what the libraries behind take without a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grasp_sparse.formats import csr_from_indices, storage_of, stored_block_size

Multiply = Callable[[Tensor, Tensor], Tensor]
Sample = Callable[[Tensor, Tensor, Tensor], Tensor]


def csr_from(weight: Tensor) -> Tensor:
    """`weight [out, in]` as CSR, with the 32-bit indices that MKL and cuSPARSE take as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed tensors are in beta
        wide = weight.detach().to_sparse_csr()
        return torch.sparse_csr_tensor(wide.crow_indices().int(), wide.col_indices().int(), wide.values(), wide.shape)


def sample_csr(like: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`left` [out, N] times `right` [N, in] where `like` has entries.

    Into a tensor with the indices of `like`: one that torch makes for itself has copies of them, of 64 bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.sparse_csr_tensor(like.crow_indices(), like.col_indices(), torch.zeros_like(like.values()), like.shape)
    return torch.sparse.sampled_addmm(found, left, right, beta=0.0, out=found)


class CompressedLinear:
    """The three products of a layer with this weight, CSR or BSR ``[out, in]``; a change of its values is seen by all of them.

    multiply: of a compressed matrix and columns. sample: of two dense matrices at the places of a compressed one.
    """

    def __init__(self, weight: Tensor, multiply: Multiply, sample: Sample) -> None:
        self.weight, self._multiply, self._sample = weight, multiply, sample
        self._order, self._transposed = _transposed(weight)

    def output(self, x: Tensor) -> Tensor:
        """[out, N] of `x` [in, N]."""
        return self._multiply(self.weight, x)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """[in, N] of `grad` [out, N]."""
        values, turned = self.weight.values(), self._transposed.values()
        if values.dim() == 1:
            torch.index_select(values, 0, self._order, out=turned)
        else:
            turned.copy_(_turned(values[self._order]))
        return self._multiply(self._transposed, grad)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Compressed as the weight is; of `grad` [out, N] and `x` [in, N]."""
        return self._sample(self.weight, grad, x.t())


def _transposed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where each entry of the transpose stands in `weight`, and the transpose."""
    columns, values = weight.col_indices(), weight.values()
    grid = storage_of(stored_block_size(values)).grid(weight.shape)
    indices = csr_from_indices(weight.crow_indices(), columns, *grid)
    order = indices.permutation.long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transposed = torch.sparse_compressed_tensor(
            indices.ccol_indices.to(columns.dtype), indices.row_indices.to(columns.dtype), _turned(values[order]).contiguous(),
            weight.shape[::-1], layout=weight.layout,
        )  # fmt: skip
    return order, transposed


def _turned(values: Tensor) -> Tensor:
    """Each block transposed; single values as they are."""
    return values.transpose(1, 2) if values.dim() == 3 else values


class CsrLinear(nn.Module):
    """`linear` with a CSR weight, and the gradients of torch's autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(csr_from(linear.weight))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.bias[:, None]


class CsrLinearByHand(nn.Module):
    """`linear` with a CSR weight, and gradients by :class:`CompressedLinear`. ``values [nnz]``: the kept weights, row by row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.products = CompressedLinear(csr_from(linear.weight), torch.sparse.mm, sample_csr)
        self.values = nn.Parameter(self.products.weight.values())  # the same memory
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return _Products.apply(self.values, self.bias, x, self.products)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, bias: Tensor, x: Tensor, products: CompressedLinear) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(x)
        return torch.addmm(bias[:, None].expand(-1, x.shape[1]), products.weight, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), products = ctx.saved_tensors, ctx.products
        of_input = products.input_gradient(grad) if ctx.needs_input_grad[2] else None
        return products.weight_gradient(grad, x).values(), grad.sum(1), of_input, None
