"""Loss of one micro-batch, and gradients of the mean loss over all samples however they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_sparse.criteria.batches import Batch
from grasp_sparse.criteria.graph import check_checkpointing, warn_unreached
from grasp_sparse.scratch import call_model, move

LossFn = Callable[[Any, Any], Tensor]
Reduce = Callable[[Sequence[Tensor]], None]  # replaces each tensor, in place, by its sum over all processes that score together


def alone(tensors: Sequence[Tensor]) -> None:
    """The sum over one process: the tensors as they are."""


def batch_loss(model: nn.Module, batch: Batch, loss_fn: LossFn | None, temperature: float) -> Tensor:
    """`loss_fn(model(inputs) / temperature, targets)`, a scalar; cross-entropy when no loss_fn is given.

    Raises ValueError when the output cannot be divided by a temperature, or the loss is no scalar that depends on the
    weights.
    """
    output = call_model(model, batch.inputs)
    if temperature != 1.0 or loss_fn is None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Expected the model to return a tensor of logits, got {type(output).__name__}: pass temperature=1 and a "
                "loss_fn(output, target) that picks what it needs"
            )
        output = output / temperature
    device = next(model.parameters()).device
    floating = output.dtype if isinstance(output, Tensor) else next(model.parameters()).dtype
    loss = (loss_fn or F.cross_entropy)(output, move(batch.targets, device, floating))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"Expected loss_fn to return one number (the mean over the samples), got {_describe(loss)}")
    if not loss.requires_grad:
        raise ValueError(
            "Expected a loss that depends on the weights, got one without a gradient (detached, or no_grad in forward?)"
        )
    return loss.reshape(())


def summed_gradient(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn | None,
    temperature: float,
    reduce: Reduce = alone,
    alike: bool = False,
) -> tuple[list[Tensor], int]:
    """Gradients of the micro-batches' mean losses, each times its share, summed over all processes; and the sum of the shares.

    A share is the number of samples, so that the quotient of the two does not depend on the cut (without BatchNorm), or 1
    for every micro-batch if they count `alike`. Memory is that of one micro-batch. Warns about weights that none of the
    micro-batches, of any process, has a gradient for. Raises ValueError where reentrant checkpointing hides some.
    """
    total = [torch.zeros_like(weight, requires_grad=False) for weight in weights.values()]
    shares, reached = 0, [False] * len(total)
    for batch in batches:
        share = 1 if alike else batch.samples
        loss = batch_loss(model, batch, loss_fn, temperature)
        check_checkpointing(loss)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        add_gradient(total, gradients, share)
        shares += share
        reached = [before or gradient is not None for before, gradient in zip(reached, gradients, strict=True)]
    counts = torch.tensor([shares, *reached], dtype=torch.float64, device=total[0].device)
    reduce([*total, counts])
    shares, *reached = counts.tolist()
    if not shares:
        raise ValueError("Expected at least one batch, got none in any of the processes that score together")
    warn_unreached([name for name, found in zip(weights, reached, strict=True) if not found])
    return total, int(shares)


def add_gradient(total: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float) -> None:
    """Adds `factor` times the gradients, None counting as zero."""
    for accumulated, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            accumulated.add_(gradient.detach(), alpha=factor)


def _describe(loss: Any) -> str:
    return f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
