"""SNIP: keep the weights whose removal would change the loss most (Lee, Ajanthan, Torr, ICLR 2019, arXiv 1810.02340)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from grasp_sparse.criteria.batches import Batch
from grasp_sparse.criteria.loss import LossFn, Reduce, alone, summed_gradient


def snip_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn | None = None,
    *,
    temperature: float = 1.0,
    train: bool = True,
    reduce: Reduce = alone,
) -> dict[str, Tensor]:
    """|θ ⊙ g| for every weight, g the gradient of the mean loss over all samples; changes `model` (a scratch copy).

    train: BatchNorm uses the statistics of the micro-batch; False scores with the running ones.
    reduce: sums over the processes that share the samples.
    """
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0, got {temperature}")
    model.train(train)
    gradient, samples = summed_gradient(model, weights, batches, loss_fn, temperature, reduce)
    return {name: (weight.detach() * g.div_(samples)).abs_() for (name, weight), g in zip(weights.items(), gradient, strict=True)}
