"""``nn.Sequential`` whose layers do what is behind them on the way, where nobody sees the difference: a norm, a ReLU."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from grasp_sparse.nn.conv import SparseConv2d
from grasp_sparse.nn.conv_norm import conv_norm, fits
from grasp_sparse.nn.linear import SparseLinear
from grasp_sparse.nn.norm import BatchNorm2d
from grasp_sparse.nn.relu import may_fuse
from grasp_sparse.nn.symbolic import is_symbolic


class FusedSequential(nn.Sequential):
    """``nn.Sequential``: the same layers, the same results; a layer that can apply the ``nn.ReLU`` right behind it does, and a sparse
    convolution and the norm behind it are one operation where :func:`~grasp_sparse.nn.conv_norm.conv_norm` says so.

    The former are :class:`~grasp_sparse.nn.BatchNorm2d`, :class:`~grasp_sparse.nn.SparseLinear`, and
    :class:`~grasp_sparse.nn.SparseConv2d` of whole blocks. Each call decides anew, so layers may be replaced, hooked, sliced or
    called one by one: a layer, called alone, applies no ReLU, and where it or the ReLU has a hook or a ``forward`` of its own
    both are called.
    """

    stock: type[nn.Sequential] = nn.Sequential  # the class of which this one is the fused kind

    def forward(self, input: Tensor) -> Tensor:
        if is_symbolic(input):
            return super().forward(input)
        left = [*self]
        while left:
            layer = left.pop(0)
            norm = left.pop(0) if left and fits(layer, left[0]) else None
            last = layer if norm is None else norm
            relu = bool(left) and type(left[0]) is nn.ReLU and applies_relu(last) and may_fuse(last, left[0])
            if relu:
                del left[0]
            if norm is not None:
                input = conv_norm(layer, norm, input, relu=relu)
            else:
                input = layer(input, relu=True) if relu else layer(input)
        return input


def applies_relu(layer: nn.Module | None) -> bool:
    """Whether its kernels can, on the way out of them. A subclass with a forward of its own promises nothing."""
    forward = getattr(type(layer), "forward", None)
    if forward is SparseConv2d.forward:
        return layer.block_size is not None
    return forward is BatchNorm2d.forward or forward is SparseLinear.forward


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
