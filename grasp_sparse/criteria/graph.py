"""Reading the graph that autograd recorded, for what it passes over without a word."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def recorded_operations(tensors: Iterable[Tensor]) -> set[str]:
    """The names of all nodes behind ``tensors``, as in ``grad_fn.name()``."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
    return {node.name() for node in seen}
