"""How operations get their derivatives, and how to call them with these.

``torch.library`` lets every operation be traced, mapped and compiled, and on each call of one that is differentiated spends in
Python about as much again as the kernel of a small layer takes. An eager call needs none of that: an autograd function with the
same formulas is enough. Nor does it know ``torch.func.grad`` (an error) and ``torch.func.jvp`` (zeros, without a word): there a
third form of the same formulas serves the one and refuses the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ops = torch.ops.grasp_sparse
# Of functorch there is no public question. Where torch does not answer this one, every call goes the way that suits all transforms.
is_transformed: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
_levels: Callable[[], list | None] = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", lambda: None)


def _undifferentiated(name: str, inputs: tuple[object, ...]) -> Tensor | tuple[Tensor, ...]:
    """Past what :mod:`torch.library` has registered with autograd, which is Python, to the kernel.

    Forward and backward of a linear layer of 16 x 16 take 70 us instead of 85.
    """
    with _below_autograd():
        return getattr(_ops, name).default(*inputs)


def _in_forward_mode() -> bool:
    """Whether tensors may carry tangents, which ``no_grad`` does not keep them from."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def _is_functionalized() -> bool:
    """Whether ``functionalize`` looks on, which knows operations but no autograd functions."""
    return is_transformed() and any(level.key().name == "Functionalize" for level in _levels() or ())


class _Ways(NamedTuple):
    eager: type[torch.autograd.Function]
    transformed: type[torch.autograd.Function]
    defaults: tuple[object, ...]  # of all arguments, None where there is no default


_ways: dict[str, _Ways] = {}


def differentiable(name: str, backward: Callable, setup: Callable) -> None:
    """Gives ``grasp_sparse::name`` its derivative, in the terms of ``torch.library.register_autograd``: there and in :func:`call`."""

    def forward(*inputs):
        return getattr(_ops, name)(*inputs)

    def forward_with(ctx, *inputs):
        output = _undifferentiated(name, inputs)
        setup(ctx, inputs, output)
        return output

    def no_jvp(ctx, *tangents):
        raise NotImplementedError(
            f"Expected reverse mode (backward, torch.func.grad, vjp, jacrev), got forward mode (torch.func.jvp, jacfwd, hessian, "
            f"torch.autograd.forward_ad), in which grasp_sparse::{name} has no derivative; of a hessian take jacrev(jacrev(f))."
        )

    def function(**members):
        # The name is what a graph shows: csr_spmmBackward.
        members = {key: staticmethod(member) for key, member in (members | {"backward": backward, "jvp": no_jvp}).items()}
        return type(name, (torch.autograd.Function,), members)

    torch.library.register_autograd(f"grasp_sparse::{name}", backward, setup_context=setup)
    # Two forms, for torch calls the second through more of Python, transformed or not.
    eager = function(forward=forward_with)
    transformed = function(forward=forward, setup_context=setup)
    transformed.generate_vmap_rule = True
    arguments = getattr(_ops, name).default._schema.arguments
    _ways[name] = _Ways(eager, transformed, tuple(argument.default_value for argument in arguments))


def call(name: str, *inputs: object) -> Tensor | tuple[Tensor, ...]:
    """``torch.ops.grasp_sparse.name(*inputs)`` of an operation that :func:`differentiable` knows.

    With less of torch around it where nothing but eager autograd looks on (what overrides torch functions sees the operation there when
    nothing can be differentiated any more), and so that ``torch.func.grad``, ``vmap`` and what is made of these differentiate it.

    Raises:
        NotImplementedError: it is differentiated in forward mode, which no operation here knows.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_functionalized():
        return getattr(_ops, name)(*inputs)
    ways = _ways[name]
    if is_transformed():
        function = ways.transformed
    elif torch.is_grad_enabled() or _in_forward_mode():
        function = ways.eager
    else:
        return _undifferentiated(name, inputs)
    return function.apply(*inputs, *ways.defaults[len(inputs) :])


class _Calls:
    """``torch.ops.grasp_sparse`` by way of :func:`call`, for formulas: they are differentiated as well."""

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(call, name)


calls = _Calls()
