"""Other ways torch has to multiply by a sparse weight on a GPU, and what a layer on them needs to be trained.

They make no bias and no gradient of one, which is in their favour, and run with the parameters that torch has for them.

Each is a function of ``weight [out, in]`` with zeros where pruned, the size of its blocks or None, and ``x [N, in]`` of the same
dtype, both on CUDA; it gives a :class:`Peer`, or None where it is not made for such a weight. What it wants converted is
converted in it, outside of what is measured: activations lie as the peer likes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.compressed import CompressedLinear, csr_from, sample_csr

BlockSize = tuple[int, int] | None
Call = Callable[[], object]


class Peer(NamedTuple):
    """`weight`: what is multiplied by. `output`: makes x Wᵀ, [N, out]. `gradients`: of an incoming gradient [N, out] a call that
    makes those of x, [N, in], and of the weight, compressed or [out, in]; None where it is measured forward only."""

    weight: Tensor
    output: Callable[[], Tensor]
    gradients: Callable[[Tensor], Callable[[], tuple[Tensor, Tensor]]] | None = None


def cusparse(weight: Tensor, block_size: BlockSize, x: Tensor) -> Peer | None:
    """CSR: SpMM, the same with the transpose, and SDDMM."""
    if block_size is not None:
        return None
    return _compressed(weight, CompressedLinear(csr_from(weight), torch.sparse.mm, sample_csr), x)


def block_addmm(weight: Tensor, block_size: BlockSize, x: Tensor) -> Peer | None:
    """BSR: torch's own Triton kernels, whose parameters torch has tuned for an A100 and warns of elsewhere."""
    if block_size is None or weight.dtype == torch.float32:
        return None
    from torch.sparse._triton_ops import bsr_dense_addmm, sampled_addmm

    nothing = weight.new_zeros(max(weight.shape), x.shape[0])

    def multiply(matrix: Tensor, columns: Tensor) -> Tensor:
        return bsr_dense_addmm(nothing[: matrix.shape[0]], matrix, columns, beta=0)

    def sample(like: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return sampled_addmm(like, left, right, beta=0.0)

    return _compressed(weight, CompressedLinear(weight.to_sparse_bsr(block_size), multiply, sample), x)


def _compressed(weight: Tensor, layer: CompressedLinear, x: Tensor) -> Peer:
    columns = x.t().contiguous()

    def gradients(grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        incoming = grad.t().contiguous()
        return lambda: (layer.input_gradient(incoming).t(), layer.weight_gradient(incoming, columns))

    return Peer(weight, lambda: layer.output(columns).t(), gradients)


def semi_structured(weight: Tensor, block_size: BlockSize, x: Tensor) -> Peer | None:
    """Two of every four weights kept, the larger ones: what that costs does not depend on how many of them are zero.

    Forward only: of a matrix that is pruned along its rows the transpose is not of this kind.
    """
    if block_size is not None or weight.dtype == torch.float32:
        return None
    from torch.sparse import to_sparse_semi_structured

    quads = weight.reshape(-1, 4)
    pruned = quads.scatter(1, quads.abs().topk(2, 1, largest=False).indices, 0).view_as(weight)
    packed = to_sparse_semi_structured(pruned)
    return Peer(pruned, lambda: F.linear(x, packed))


PEERS = {"cuSPARSE (torch CSR)": cusparse, "torch bsr_dense_addmm": block_addmm, "torch 2:4": semi_structured}


def available(
    weight: Tensor, block_size: BlockSize, x: Tensor, grad: Tensor, tolerance: float, tell: Callable[[str], None]
) -> dict[str, dict[str, Call]]:
    """By pass, "forward" and "forward+backward", the peers that run and are right to `tolerance` of the largest value, by name;
    of each other one a line, why not. `grad`: incoming gradient, [N, out]."""
    found: dict[str, dict[str, Call]] = {"forward": {}, "forward+backward": {}}
    for name, build in PEERS.items():
        told = f"peer not available: {name} {str(weight.dtype).removeprefix('torch.')}"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*beta state")  # of compressed tensors
                peer = build(weight, block_size, x)
                if peer is None:
                    continue
                _check({"output": (peer.output(), x.double() @ peer.weight.double().t())}, tolerance)
                found["forward"][name] = peer.output
                if peer.gradients is None:
                    continue
                told += " backward"
                both = _both(peer, grad)
                _check(_results(both(), peer.weight, x, grad), tolerance)
                found["forward+backward"][name] = both
        except Exception as problem:  # whatever they do: they are peers, and what is measured is ours
            tell(f"{told}: {(str(problem).strip() or type(problem).__name__).splitlines()[0][:150]}")
    return found


def _both(peer: Peer, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    gradients = peer.gradients(grad)
    return lambda: (peer.output(), *gradients())


def _results(made: tuple[Tensor, Tensor, Tensor], weight: Tensor, x: Tensor, grad: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What was made of a layer with this weight, and what should have been, in float64; of the weight where it is not zero."""
    output, of_input, of_weight = made
    exact_weight, exact_x, exact_grad = weight.double(), x.double(), grad.double()
    kept = weight != 0
    return {
        "output": (output, exact_x @ exact_weight.t()),
        "input gradient": (of_input, exact_grad @ exact_weight),
        "weight gradient": (of_weight.to_dense() * kept, (exact_grad.t() @ exact_x) * kept),
    }


def _check(results: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    """Raises ArithmeticError where something made differs from what is expected."""
    for what, (made, expected) in results.items():
        error = float((made.double() - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:  # also when it is NaN
            raise ArithmeticError(f"{what} is wrong by {error:.1e}")
