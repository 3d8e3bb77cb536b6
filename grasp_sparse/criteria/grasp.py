"""GraSP: keep the weights whose removal would hurt gradient flow most.

Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, arXiv 2002.07376.

Sign, documented here once. Removing weight q changes the squared gradient norm ‖g‖² by about −2·θ_q·(Hg)_q. The paper's
score is S = −θ ⊙ Hg and removes the HIGHEST. A score in this project is an importance, larger is kept, so ours is

    score = θ ⊙ Hg = −S,      g = ∇L,  H = ∇²L,  L = cross-entropy(logits / T),  T = 200.

One Hessian-vector product by double backward, never a Hessian. Micro-batches need two passes: the first accumulates g
over all of them, the second differentiates ⟨∇L_b, g⟩ for each b with g held constant, so memory is that of one
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grasp_sparse.criteria.batches import Batch
from grasp_sparse.criteria.loss import LossFn, Reduce, add_gradient, alone, batch_loss, summed_gradient
from grasp_sparse.criteria.second_derivative import check_twice_differentiable, explained, use_twice_differentiable
from grasp_sparse.scratch import capture_rng, zero_outside


def grasp_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn | None = None,
    *,
    temperature: float = 200.0,
    train: bool = True,
    preset: str | None = None,
    redraw: str | None = None,
    generator: torch.Generator | None = None,
    reduce: Reduce = alone,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """θ ⊙ Hg for every weight; changes `model` (a scratch copy) and iterates `batches` twice.

    g is the gradient of `weights`, which are those that may be pruned: what is left out or cannot be pruned here (grouped
    convolutions, subclasses) counts as a constant of the network, where the authors take g over every Conv2d and Linear.

    temperature: divides the logits before loss_fn; use 1 for a loss that is not one of logits.
    train: BatchNorm uses the statistics of the micro-batch and dropout is on (the same masks in both passes), as in the
        paper; False scores with running statistics, which selects other weights.
    redraw: "all" re-draws every Linear of the copy with Xavier-normal, in module order, from `generator` (None: the
        global one) before scoring, "last" only the last Linear (the authors' ImageNet code). Their detail, and a large
        influence.
    preset: "paper" is the authors' code: redraw="all" unless given, each batch cut in two halves at N // 2, g the SUM
        of the halves' mean gradients and Hg the sum of H_half·g. Draw the batches with `samples_per_class` and
        `num_classes`.
    reduce: sums over the processes that share the samples: g between the passes, so that each differentiates with the
        gradient of all samples, and Hg at the end.
    within: bool masks of what is left; the rest is zero, is not drawn again and has no part in g, as weights have that are gone.
    Raises ValueError for a model with an operation that has no second derivative.
    """
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0, got {temperature}")
    if preset not in (None, "paper"):
        raise ValueError(f"Expected preset None or 'paper', got {preset!r}")
    if preset == "paper":
        redraw, batches = redraw or "all", _Halves(batches)
    if redraw not in (None, "all", "last"):
        raise ValueError(f"Expected redraw None, 'all' or 'last', got {redraw!r}")
    model.train(train)
    use_twice_differentiable(model)
    if redraw:
        _redraw_linears(model, redraw, generator)
        zero_outside(weights, within)

    parameters = list(weights.values())
    paper = preset == "paper"
    product = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    restart_rng = capture_rng()
    # Fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH), explained():
        gradient, total = summed_gradient(model, weights, batches, loss_fn, temperature, reduce, alike=paper)
        if not paper:
            for accumulated in gradient:
                accumulated.div_(total)
        zero_outside(dict(zip(weights, gradient, strict=True)), within)

        restart_rng()  # the second pass must see the same dropout masks as the first
        for batch in batches:
            share = 1 if paper else batch.samples / total
            loss = batch_loss(model, batch, loss_fn, temperature)
            add_gradient(product, _hessian_vector(loss, parameters, gradient), share)
        reduce(product)
    return {name: hg.mul_(weight.detach()) for (name, weight), hg in zip(weights.items(), product, strict=True)}


def _hessian_vector(loss: Tensor, parameters: list[nn.Parameter], vector: list[Tensor]) -> list[Tensor | None]:
    """∂⟨∇loss, vector⟩/∂parameters; None where it does not depend on the parameter."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    check_twice_differentiable(gradients)
    inner = [(g * v).sum() for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    if not inner:  # a loss linear in the weights has no curvature
        return [None] * len(parameters)
    return list(torch.autograd.grad(torch.stack(inner).sum(), parameters, allow_unused=True))


def _redraw_linears(model: nn.Module, which: str, generator: torch.Generator | None) -> None:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linears if which == "all" else linears[-1:]:
        # Drawn on the generator's device: a CPU generator then gives the same weights to a model on a GPU.
        device = module.weight.device if generator is None else generator.device
        fresh = torch.empty_like(module.weight, device=device, requires_grad=False)
        nn.init.xavier_normal_(fresh, generator=generator)
        module.weight.data.copy_(fresh)


class _Halves:
    """Each batch as [:N // 2] and [N // 2:]."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self._batches:
            if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or len(inputs) < 2:
                raise ValueError("Expected tensor batches of at least two samples to cut in halves for preset='paper'")
            middle = len(inputs) // 2
            yield Batch(inputs[:middle], targets[:middle])
            yield Batch(inputs[middle:], targets[middle:])
