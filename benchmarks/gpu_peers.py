"""Other ways torch has to multiply by a sparse weight on a GPU: forward only, for that is what they offer to training.

Each is a function of ``weight [out, in]`` with zeros where pruned, the size of its blocks or None, and ``x [N, in]`` of the same
dtype, both on CUDA. It gives a call that makes x Wᵀ as ``[N, out]``, and the weight that is multiplied by; None where the peer is
not made for such a weight. What it wants converted is converted in it, outside of what is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[], Tensor]
BlockSize = tuple[int, int] | None


def cusparse(weight: Tensor, block_size: BlockSize, x: Tensor) -> tuple[Product, Tensor] | None:
    if block_size is not None:
        return None
    csr, columns = weight.to_sparse_csr(), x.t().contiguous()
    return lambda: torch.sparse.mm(csr, columns).t(), weight


def block_addmm(weight: Tensor, block_size: BlockSize, x: Tensor) -> tuple[Product, Tensor] | None:
    if block_size is None or weight.dtype == torch.float32:
        return None
    from torch.sparse._triton_ops import bsr_dense_addmm

    bsr, columns, nothing = weight.to_sparse_bsr(block_size), x.t().contiguous(), weight.new_zeros(weight.shape[0], x.shape[0])
    return lambda: bsr_dense_addmm(nothing, bsr, columns, beta=0).t(), weight


def semi_structured(weight: Tensor, block_size: BlockSize, x: Tensor) -> tuple[Product, Tensor] | None:
    """Two of every four weights kept, the larger ones: what that costs does not depend on how many of them are zero."""
    if block_size is not None or weight.dtype == torch.float32:
        return None
    from torch.sparse import to_sparse_semi_structured

    quads = weight.reshape(-1, 4)
    pruned = quads.scatter(1, quads.abs().topk(2, 1, largest=False).indices, 0).view_as(weight)
    packed = to_sparse_semi_structured(pruned)
    return lambda: F.linear(x, packed), pruned


PEERS = {"cuSPARSE (torch CSR)": cusparse, "torch bsr_dense_addmm": block_addmm, "torch 2:4": semi_structured}


def available(
    weight: Tensor, block_size: BlockSize, x: Tensor, tolerance: float, tell: Callable[[str], None]
) -> dict[str, Product]:
    """The peers that run and are right to `tolerance` of the largest value, by name; of each other one a line, why not."""
    found: dict[str, Product] = {}
    for name, build in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sparse tensors are in beta
                made = build(weight, block_size, x)
                if made is None:
                    continue
                product, multiplied = made
                expected = x.double() @ multiplied.double().t()
                error = float((product().double() - expected).abs().max() / expected.abs().max())
        except Exception as problem:  # whatever they do: they are peers, and what is measured is ours
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[0][:150]
            tell(f"peer not available: {name} {str(weight.dtype).removeprefix('torch.')}: {reason}")
            continue
        if error <= tolerance:
            found[name] = product
        else:
            tell(f"peer not available: {name} {str(weight.dtype).removeprefix('torch.')}: wrong by {error:.1e}")
    return found
