"""Reading the graph that autograd recorded, for what it passes over without a word; and saying which weights it did not reach."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

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


def check_checkpointing(output: Tensor) -> None:
    """ValueError if reentrant checkpointing lies behind ``output``: its weights are in no graph, and would get no gradient."""
    if "CheckpointFunctionBackward" in recorded_operations([output]):
        raise ValueError(
            "Expected activation checkpointing with use_reentrant=False, got use_reentrant=True, which hides the weights inside "
            "from torch.autograd.grad: pass use_reentrant=False to torch.utils.checkpoint, or switch checkpointing off"
        )


def warn_unreached(names: Sequence[str]) -> None:
    """Warns that these weights, if any, had no gradient."""
    if names:
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(
            f"No gradient reached {listed} in any batch: all scores there are 0. The forward leaves them out, or detaches what "
            "comes of them; exclude them to keep them dense.",
            stacklevel=2,
        )
