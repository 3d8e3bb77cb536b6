"""``nn.Sequential`` whose layers do what is behind them on the way, where nobody sees the difference: a norm, a ReLU."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from grasp_sparse.nn.conv import SparseConv2d
from grasp_sparse.nn.conv_norm import run_as_one, runs_as_one
from grasp_sparse.nn.linear import SparseLinear
from grasp_sparse.nn.norm import BatchNorm2d
from grasp_sparse.nn.relu import behaves_as, may_fuse
from grasp_sparse.nn.symbolic import is_symbolic


class FusedSequential(nn.Sequential):
    """``nn.Sequential``: the same layers, the same results; a layer that can apply the ``nn.ReLU`` right behind it does, and a sparse
    convolution and the norm behind it are one operation where :func:`~grasp_sparse.nn.conv_norm.runs_as_one` says so.

    The former are :class:`~grasp_sparse.nn.BatchNorm2d`, :class:`~grasp_sparse.nn.SparseLinear`, and
    :class:`~grasp_sparse.nn.SparseConv2d` of whole blocks. Each call decides anew, so layers may be replaced, hooked, sliced or
    called one by one: a layer, called alone, applies no ReLU, and where it or the ReLU has a hook or a ``forward`` of its own
    both are called.
    """

    stock: type[nn.Sequential] = nn.Sequential  # the class of which this one is the fused kind

    def forward(self, input: Tensor) -> Tensor:
        if is_symbolic(input):
            return super().forward(input)
        layers, at = [*self], 0
        while at < len(layers):
            layer, behind = layers[at], layers[at + 1 : at + 3]
            norm = behind.pop(0) if behind and runs_as_one(layer, behind[0], input) else None
            last = layer if norm is None else norm
            relu = len(behind) > 0 and type(behind[0]) is nn.ReLU and applies_relu(last) and may_fuse(last, behind[0])
            if norm is not None:
                input = run_as_one(layer, norm, input, relu=relu)
            else:
                input = layer(input, relu=True) if relu else layer(input)
            at += 1 + (norm is not None) + relu
        return input


def applies_relu(layer: nn.Module | None) -> bool:
    """Whether its kernels can, on the way out of them."""
    if behaves_as(layer, SparseConv2d):
        return layer.block_size is not None
    return behaves_as(layer, BatchNorm2d) or behaves_as(layer, SparseLinear)


@functools.cache
def fused_kind(kind: type[nn.Sequential]) -> type[FusedSequential] | None:
    """The class to be given to modules of class ``kind``; None if ``kind`` has its own forward or its own way to be copied.

    Also None where making a subclass runs code of the user's.
    """
    if kind is nn.Sequential:
        return FusedSequential
    own = {name for base in kind.__mro__ if base not in nn.Sequential.__mro__ for name in vars(base)}
    if own & {"forward", "__reduce__", "__reduce_ex__", "__init_subclass__"}:
        return None
    members = {"__doc__": kind.__doc__, "__module__": __name__, "__reduce_ex__": _reduce, "stock": kind}
    return type(f"Fused{kind.__name__}", (FusedSequential, kind), members)


def _reduce(module: FusedSequential, protocol: int) -> tuple:
    """For copy and pickle: a class that is made here is not found by its name, that of which it was made is."""
    return _empty, (module.stock,), module.__getstate__()


def _empty(kind: type[nn.Sequential]) -> nn.Sequential:
    fused = fused_kind(kind) or kind
    return fused.__new__(fused)
