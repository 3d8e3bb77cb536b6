"""Loss of one micro-batch, and gradients of the mean loss over all samples however they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_sparse.criteria.batches import Batch
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


def mean_gradient(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn | None,
    temperature: float,
    reduce: Reduce = alone,
) -> list[Tensor]:
    """Gradient of the mean loss over all samples, of all processes, with the memory of one micro-batch.

    A micro-batch's own mean counts by its number of samples, so the result does not depend on the cut (without
    BatchNorm).
    """
    total = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
    samples = 0
    for batch in batches:
        loss = batch_loss(model, batch, loss_fn, temperature)
        add_gradient(total, torch.autograd.grad(loss, weights, allow_unused=True), batch.samples)
        samples += batch.samples
    samples = sum_samples(total, samples, reduce)
    return [gradient.div_(samples) for gradient in total]


def sum_samples(tensors: Sequence[Tensor], samples: int, reduce: Reduce) -> int:
    """Sums ``tensors``, in place, and ``samples`` over all processes; returns the latter. ValueError when nobody had any."""
    count = torch.tensor(samples, dtype=torch.float64, device=tensors[0].device)
    reduce([*tensors, count])
    if not count:
        raise ValueError("Expected at least one batch, got none in any of the processes that score together")
    return int(count)


def add_gradient(total: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float) -> None:
    """Adds `factor` times the gradients, None counting as zero."""
    for accumulated, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            accumulated.add_(gradient.detach(), alpha=factor)


def _describe(loss: Any) -> str:
    return f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
