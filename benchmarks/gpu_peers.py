"""Other ways torch has to multiply by a sparse weight on a GPU: forward only, for that is what they offer to training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[], Tensor]


def products(weight: Tensor, block_size: tuple[int, int] | None, x: Tensor) -> Iterator[tuple[str, Product]]:
    """(name, function that gives x Wᵀ as ``[N, out]``) of every peer that takes a weight with this structure.

    weight: ``[out, in]`` with zeros where pruned. x: ``[N, in]`` of the same dtype. Both on CUDA; what a peer wants converted is
    converted here, outside of what is measured.
    """
    columns = x.t().contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are in beta
        if block_size is None:
            csr = weight.to_sparse_csr()
            yield "cuSPARSE (torch CSR)", lambda: torch.sparse.mm(csr, columns).t()
        elif weight.dtype != torch.float32:
            from torch.sparse._triton_ops import bsr_dense_addmm

            bsr, nothing = weight.to_sparse_bsr(block_size), weight.new_zeros(weight.shape[0], x.shape[0])
            yield "torch bsr_dense_addmm", lambda: bsr_dense_addmm(nothing, bsr, columns, beta=0).t()


def semi_structured(weight: Tensor, x: Tensor) -> tuple[str, Product, Tensor]:
    """(name, product, the weight it multiplies by): two of every four weights kept, the larger ones. 16-bit dtypes on CUDA."""
    from torch.sparse import to_sparse_semi_structured

    quads = weight.reshape(-1, 4)
    pruned = quads.scatter(1, quads.abs().topk(2, 1, largest=False).indices, 0).view_as(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = to_sparse_semi_structured(pruned)
    return "torch 2:4", lambda: F.linear(x, packed), pruned
