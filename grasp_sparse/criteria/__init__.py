"""Criteria: a score per weight, larger = kept. One file each; `score` is the way in.

A criterion is a function `(model, weights, batches, loss_fn, **options) -> {name: scores}`. It gets a scratch copy of
the model, which it may change at will, the copy's weights to score, by parameter name, and re-iterable micro-batches. In
rounds weights that are gone are zero; functions of the caller's own are not told which they are.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.criteria.batches import (
    MEMORY_LIMIT, Batch, RereadBatches, StoredBatches, balanced_batches, class_balanced, micro_batches,
)  # fmt: skip
from grasp_sparse.criteria.grasp import grasp_scores
from grasp_sparse.criteria.loss import LossFn, Reduce
from grasp_sparse.criteria.magnitude import magnitude_scores
from grasp_sparse.criteria.random import random_scores
from grasp_sparse.criteria.snip import snip_scores
from grasp_sparse.criteria.synflow import synflow_scores
from grasp_sparse.forwards import check_forwards
from grasp_sparse.scratch import scratch_copy, zero_outside
from grasp_sparse.weights import Selector, WeightSelection, check_values, check_within, find_weights

__all__ = ["CRITERIA", "Criterion", "class_balanced", "get_criterion", "score"]


class Criterion(NamedTuple):
    """A scoring function and what it needs."""

    function: Callable[..., Mapping[str, Tensor]]
    reads: int | None = None  # how many batches it looks at; None: all it is given
    iterations: int = 1  # rounds of score-and-prune it was published with
    dtype: torch.dtype | None = None  # scored in this dtype unless the caller asks for another
    sums: bool = False  # adds over the samples, so that processes can share them: takes `reduce`
    couples: bool = False  # a score depends on the gradients of other weights: takes `within`


CRITERIA: dict[str, Criterion] = {
    "grasp": Criterion(grasp_scores, sums=True, couples=True),
    "snip": Criterion(snip_scores, sums=True),
    "synflow": Criterion(synflow_scores, reads=1, iterations=100, dtype=torch.float64),
    "magnitude": Criterion(magnitude_scores, reads=0),
    "random": Criterion(random_scores, reads=0),
}


def get_criterion(criterion: str | Callable[..., Mapping[str, Tensor]]) -> Criterion:
    """The criterion of that name, or a function of the caller's own; ValueError for an unknown name."""
    if callable(criterion):
        return Criterion(criterion)
    if criterion not in CRITERIA:
        raise ValueError(f"Expected criterion to be one of {', '.join(CRITERIA)} or a function, got {criterion!r}")
    return CRITERIA[criterion]


def score(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    criterion: str | Callable[..., Mapping[str, Tensor]] = "grasp",
    loss_fn: LossFn | None = None,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    num_batches: int | None = None,
    samples_per_class: int | None = None,
    num_classes: int | None = None,
    micro_batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    reduce: Reduce | None = None,
    within: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Scores every prunable weight of `model`: parameter name -> tensor of the weight's shape, larger is kept.

    batches: an iterable of (input, target), such as a DataLoader; `num_batches` takes only its first so many. With
        `samples_per_class` and `num_classes`, `num_batches` (default 1) class-balanced batches are drawn from it
        instead. It is read once and its samples kept on the CPU (see criteria/batches.py); magnitude and random need
        none, synflow only a shape.
    micro_batch_size: cuts batches further; memory is that of one micro-batch, and the score of a network without
        BatchNorm stays the same.
    loss_fn: (output, target) -> mean loss over the samples; cross-entropy by default. GraSP divides the output by its
        temperature of 200 before: pass temperature=1 with a loss that is not one of logits.
    include, exclude: which layers, see `find_weights`.
    dtype: score in this dtype (torch.float64 for exactness). seed: seeds everything random in here.
    reduce: several processes score together, each given its own part of the samples (whole micro-batches; none is allowed):
        called with a list of tensors, it replaces each by its sum over all processes, in place, e.g. by
        torch.distributed.all_reduce. Criteria that add nothing over samples (synflow, magnitude, random) never call it.
    within: bool masks by name, for pruning in rounds: the network is scored with the weights outside of them gone. Their own scores
        mean nothing; give `make_masks` the same masks.
    options: the criterion's own, e.g. temperature, train, preset="paper" of grasp.

    Autocast is off inside; whether float32 products may be TF32 remains what torch.backends says.
    Works on a copy: weights, buffers, gradients, modes, hooks and the global random state come back untouched. Module
    hooks are copied along and do fire on the copy, once per forward of the scoring: what they do outside the model
    (counting, logging) happens. Two calls from the same random state (or seed) give the same bits. Raises ValueError
    for bad arguments, a compiled model, weights on the meta device, reentrant checkpointing, a `forward` set on a module that
    would run the model in place of the copy, a layer whose scores are not finite and scores that are all zero. Warns about
    weights without a gradient, which score 0.
    """
    check_uncompiled(model)
    chosen = get_criterion(criterion)
    if reduce is not None and callable(criterion):
        raise ValueError("Expected one of the named criteria with reduce, got a function: whether it adds over samples is unknown")
    if batches is None and chosen.reads != 0 and isinstance(criterion, str):
        raise ValueError(f"Expected batches of (input, target) for criterion={criterion!r}, got None")
    found = _require(find_weights(model, include, exclude)).weights
    for weight in found:
        check_values(weight.name, weight.parameter)
    names = [weight.name for weight in found]
    if chosen.reads != 0:
        check_forwards(model)
    with scratch_copy(model, dtype=dtype or chosen.dtype, seed=seed) as scratch:
        parameters = dict(scratch.named_parameters())
        weights = {name: parameters[name].requires_grad_() for name in names}
        if within is not None:
            check_within(within, weights)
            within = {name: within[name].to(weight.device) for name, weight in weights.items()}
            zero_outside(weights, within)
            if chosen.couples:
                options["within"] = within
        stored: Iterable[Batch] = ()
        if batches is not None and chosen.reads != 0:
            stored = store_batches(
                batches,
                reads=chosen.reads,
                num_batches=num_batches,
                samples_per_class=samples_per_class,
                num_classes=num_classes,
                micro_batch_size=micro_batch_size,
                allow_none=reduce is not None and chosen.sums,
            )
        if reduce is not None and chosen.sums:
            options["reduce"] = reduce
        # As a copy of a half-precision model is made float32: second derivatives mean nothing in 8 or 11 bits.
        with torch.autocast(next(iter(weights.values())).device.type, enabled=False):
            return _checked(chosen.function(scratch, weights, stored, loss_fn, **options), weights)


def _checked(scores: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The scores of these weights, detached. ValueError where one has none or impossible ones, or all are zero."""
    if missing := sorted(weights.keys() - scores.keys()):
        raise ValueError(f"Expected the criterion to score every weight, got none for {', '.join(missing)}")
    for name, weight in weights.items():
        check_scores(name, scores[name], weight.shape)
    if not any(bool(scores[name].any()) for name in weights):
        raise ValueError(
            "Expected scores that tell weights apart, got 0 for every weight, so that masks would follow the order of the "
            "layers: look for weights or gradients that are all zero (an output layer that starts at zero, a network pruned "
            "until nothing passes) and, with criterion='grasp', for a loss without curvature"
        )
    return {name: scores[name].detach() for name in weights}


def store_batches(
    batches: Iterable[Any],
    *,
    reads: int | None = None,
    num_batches: int | None = None,
    samples_per_class: int | None = None,
    num_classes: int | None = None,
    micro_batch_size: int | None = None,
    allow_none: bool = False,
) -> StoredBatches | RereadBatches:
    """The samples to score on, read once unless they can be made again; arguments as in `score`, `reads` as in Criterion.

    allow_none: other processes may have all the batches.
    """
    if isinstance(batches, StoredBatches):
        return batches
    for name, value in (("num_batches", num_batches), ("micro_batch_size", micro_batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} of at least 1, got {value}")
    if (samples_per_class is None) != (num_classes is None):
        raise ValueError("Expected samples_per_class and num_classes together, got only one of them")
    if reads is not None:
        return StoredBatches(batches, count=reads)
    if samples_per_class is not None:
        batches, num_batches = balanced_batches(batches, samples_per_class, num_classes, num_batches or 1), None
    if isinstance(batches, RereadBatches) and num_batches is None and micro_batch_size is None:
        return batches
    stored = StoredBatches(batches, count=num_batches, memory_limit=MEMORY_LIMIT, allow_none=allow_none)
    if stored.spilled:
        warnings.warn(
            f"The batches to score on take more than the {MEMORY_LIMIT / 2**30:g} GiB that memory holds of them: the rest is in a file in "
            f"{tempfile.gettempdir()}. num_batches says how many are read.",
            stacklevel=4,
        )
    return stored if micro_batch_size is None else StoredBatches(micro_batches(stored, micro_batch_size), allow_none=allow_none)


def check_uncompiled(model: nn.Module) -> None:
    """ValueError if `model`, or a module inside it, is what torch.compile returned.

    Compiled backwards have no second derivative, and `_orig_mod.` in every name would fit no other copy of the model.
    `model.compile()` is fine: it renames nothing and copies come out uncompiled.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            path = f"model.{name}" if name else "model"
            raise ValueError(
                f"Expected an uncompiled model, got {path} from torch.compile: "
                f"use {path}._orig_mod in its place and compile after pruning"
            )


def check_scores(name: str, scores: Tensor, shape: torch.Size | None = None) -> None:
    """ValueError naming the layer unless its scores are floating-point, of the weight's shape, not empty and finite."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"Expected floating-point scores for {name!r}, got {got}")
    if shape is not None and scores.shape != shape:
        raise ValueError(f"Expected scores of shape {list(shape)} for {name!r}, got {list(scores.shape)}")
    if not scores.numel():
        raise ValueError(f"Expected scores of at least one weight, got shape {list(scores.shape)} for {name!r}: leave it out")
    if not bool(torch.isfinite(scores).all()):
        kind = "NaN" if bool(torch.isnan(scores).any()) else "infinite values"
        raise ValueError(
            f"Expected finite scores, got {kind} in {name!r}: look for NaN in weights or inputs; "
            "an overflow goes away with dtype=torch.float64"
        )


def _require(selection: WeightSelection) -> WeightSelection:
    if not selection.weights:
        left = "; ".join(f"{module}: {reason}" for module, reason in selection.skipped[:5]) or "it has no weights at all"
        raise ValueError(f"Expected a model with at least one prunable Linear or Conv2d, got none ({left})")
    return selection
