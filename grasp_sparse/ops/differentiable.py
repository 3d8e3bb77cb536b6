"""How operations get their derivatives, and the short way to call them with these.

``torch.library`` lets every operation be traced, transformed and compiled, and on each call of one that is differentiated spends in
Python about as much again as the kernel of a small layer takes. An eager call needs none of that: an autograd function with the
same formulas is enough.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ops = torch.ops.grasp_sparse
_functions: dict[str, type[torch.autograd.Function]] = {}
# Of functorch there is no public question. Where torch does not answer this one, every call takes the long way.
is_transformed: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def differentiable(name: str, backward: Callable, setup: Callable) -> None:
    """Gives ``grasp_sparse::name`` its derivative, in the terms of ``torch.library.register_autograd``: there and in :func:`call`."""

    def forward(ctx, *inputs):
        output = getattr(_ops, name)(*inputs)
        setup(ctx, inputs, output)
        return output

    torch.library.register_autograd(f"grasp_sparse::{name}", backward, setup_context=setup)
    # The name is what a graph shows: csr_spmmBackward.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[name] = type(name, (torch.autograd.Function,), members)


def call(name: str, *inputs: object) -> Tensor | tuple[Tensor, ...]:
    """``torch.ops.grasp_sparse.name(*inputs)``, with less of torch around it where nothing but eager autograd looks on.

    Of an operation that :func:`differentiable` knows, and with all its arguments: defaults are not filled in.
    """
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()):
        return _functions[name].apply(*inputs)
    return getattr(_ops, name)(*inputs)
