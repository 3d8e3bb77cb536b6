"""Who keeps how much: how many groups of weights each layer keeps under one budget.

Every layer has groups (single weights, or blocks: a pattern's business) of one cost each: 1 per weight, or
multiply-adds, or seconds. Within a layer the kept groups are always its highest scores, so a count per layer is the
whole answer.

- `global`: keep the largest score − λ·cost, the Lagrangian of "most score for this budget". Kept is what has score ≥ λ·cost,
  that is score / cost ≥ λ: solving for λ is finding the budget's cut in the order of score per cost. The rule at the cut is
  exact and maximal: walk down that order and keep every group that still fits; one that no longer fits is passed over. Equal
  ratios go by larger score, then first layer, then first index. With equal costs this is the top of one global ranking (the
  paper), λ its threshold.
- `layer`: the same density everywhere.
- `erk`: densities proportional to (out + in + kh + kw) / (out·in·kh·kw), layers that would pass 1 staying dense
  (Erdős–Rényi-Kernel: Evci et al., ICML 2020, arXiv 1911.11134).

A weight whose groups are not all of one cost (smaller ones at its edges) is several layers, one for each cost. Under `layer`
and `erk` they share what the weight may spend: it goes to its best groups by score per cost, whatever they cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_sparse.patterns import top_k_mask

SCOPES = ("global", "layer", "erk")
_SORTED_AT_ONCE = 1 << 16
_PIVOT_SAMPLE = 4096


class Layer(NamedTuple):
    """One weight as allocation sees it; or those of its groups that have one cost."""

    name: str
    scores: Tensor  # [candidates], finite: the groups that may be kept
    groups: int  # all groups of the layer, candidates or not: what a density is a share of
    cost: float  # of one group, in units of the budget
    minimum: int  # groups kept in any case
    shape: tuple[int, ...]  # of the weight
    continues: bool = False  # the weight of the layer before: its groups of another cost


def allocate(layers: Sequence[Layer], limit: float, scope: str = "global") -> list[int]:
    """Groups kept per layer: total cost at most `limit`, every layer at least its minimum and at most its candidates.

    The result is maximal: no further group fits, except that free layers under `layer` and `erk` keep their prescribed
    density.
    Raises ValueError for an unknown scope and when the minima alone cost more than the limit.
    """
    if scope not in SCOPES:
        raise ValueError(f"Expected scope to be one of {', '.join(SCOPES)}, got {scope!r}")
    needed = math.fsum(layer.minimum * layer.cost for layer in layers)
    if needed > limit:
        total = math.fsum(layer.groups * layer.cost for layer in layers)
        raise ValueError(
            f"Expected a budget that covers the minimum of every layer, {needed / total:.4%} of the total, "
            f"got {limit / total:.4%}: lower the sparsity, min_density or min_per_layer"
        )
    if scope == "global":
        return _by_score(layers, limit)
    counts = _by_density(layers, limit, [1.0 if scope == "layer" else erk_factor(layer.shape) for layer in layers])
    if any(layer.continues for layer in layers):
        _take_the_best_of_each_weight(layers, counts, limit)
    return counts


def erk_factor(shape: Sequence[int]) -> float:
    """Relative density of a weight [out, in, *kernel]: sum of its dimensions over their product."""
    return sum(shape) / math.prod(shape)


def _by_score(layers: Sequence[Layer], limit: float) -> list[int]:
    counts = [layer.minimum if layer.cost else layer.scores.numel() for layer in layers]
    if not any(layer.cost for layer in layers):
        return counts
    prices = _prices(layers)
    pending = [
        layer.scores[~top_k_mask(layer.scores, count)] if count else layer.scores
        for layer, count in zip(layers, counts, strict=True)
    ]
    room = limit - _spent(layers, counts)
    pending = _narrow(layers, pending, prices, counts, room)
    room = limit - _spent(layers, counts)
    owners = _in_order(pending, prices)
    costs = torch.tensor([layer.cost for layer in layers], dtype=torch.float64)
    fitting = int((costs[owners].cumsum(0) <= room).count_nonzero())
    for index, n in enumerate(torch.bincount(owners[:fitting], minlength=len(layers)).tolist()):
        counts[index] += n
    _fill_remainder(layers, prices, counts, limit)
    return counts


def _prices(layers: Sequence[Layer]) -> list[float]:
    """Costs relative to the cheapest: ratios then divide by numbers ≥ 1, so they cannot overflow, and equal costs by exactly 1."""
    cheapest = min(layer.cost for layer in layers if layer.cost)
    return [layer.cost / cheapest for layer in layers]


def _narrow(
    layers: Sequence[Layer], pending: list[Tensor], prices: list[float], counts: list[int], room: float
) -> list[Tensor]:
    """Nears the cut without sorting everything: adds what surely fits to `counts`, returns the groups left to decide.

    A weighted quickselect: pivots are medians of a sample, and every step drops the side that is decided. About two
    reads of all scores, where sorting 25 million would take seconds. Ratios are float64: float32 scores over a cost
    keep their order.
    """
    generator = torch.Generator().manual_seed(0)
    while sum(values.numel() for values in pending) > _SORTED_AT_ONCE:
        pivot = _sample_median(pending, prices, generator)
        # One layer after the other: the ratios of all would take twice what their scores do.
        above, equal = zip(*((ratio > pivot, ratio == pivot) for ratio in map(_ratios, pending, prices)), strict=True)
        taken = [int(mask.count_nonzero()) for mask in above]
        cost = math.fsum(n * layer.cost for n, layer in zip(taken, layers, strict=True))
        if cost > room:
            pending = [values[mask] for values, mask in zip(pending, above, strict=True)]
            continue
        counts[:] = [count + n for count, n in zip(counts, taken, strict=True)]
        room -= cost
        tied = [int(mask.count_nonzero()) for mask in equal]
        cost = math.fsum(n * layer.cost for n, layer in zip(tied, layers, strict=True))
        if cost > room:
            return [values[mask] for values, mask in zip(pending, equal, strict=True)]
        counts[:] = [count + n for count, n in zip(counts, tied, strict=True)]
        room -= cost
        pending = [values[~(more | same)] for values, more, same in zip(pending, above, equal, strict=True)]
    return pending


def _ratios(scores: Tensor, price: float) -> Tensor:
    """Score per cost, in float64.

    The price is a tensor on the scores' device: CUDA divides by a number as it multiplies by its reciprocal, which rounds twice, and a
    pivot would no longer be the ratio that it was taken from.
    """
    return scores.double() / torch.full((), price, dtype=torch.float64, device=scores.device)


def _sample_median(pending: list[Tensor], prices: list[float], generator: torch.Generator) -> float:
    """Median score per cost of a random sample, each layer represented by its size; an element of `pending`."""
    total = sum(values.numel() for values in pending)
    sample = []
    for values, price in zip(pending, prices, strict=True):
        if values.numel():
            size = -(-values.numel() * _PIVOT_SAMPLE // total)
            chosen = torch.randint(values.numel(), (size,), generator=generator)
            sample.append(_ratios(values[chosen.to(values.device)], price).cpu())
    return float(torch.cat(sample).median())


def _in_order(pending: list[Tensor], prices: list[float]) -> Tensor:
    """The layer of every pending group, in filling order: score per cost, then score, then layer, then index."""
    scores = torch.cat([values.cpu().double() for values in pending])
    owners = torch.arange(len(pending)).repeat_interleave(torch.tensor([values.numel() for values in pending]))
    by_score = scores.argsort(descending=True, stable=True)
    ratios = scores / torch.tensor(prices, dtype=torch.float64)[owners]
    return owners[by_score[ratios[by_score].argsort(descending=True, stable=True)]]


def _fill_remainder(layers: Sequence[Layer], prices: list[float], counts: list[int], limit: float) -> None:
    """Goes on down the order below the cut and adds every group that still fits, until nothing does."""
    room = limit - _spent(layers, counts)
    pending = []
    for layer, count in zip(layers, counts, strict=True):
        rest = layer.scores[:0]
        if count < layer.scores.numel() and 0 < layer.cost <= room:
            rest = layer.scores[~top_k_mask(layer.scores, count)]
            rest = rest.topk(min(rest.numel(), int(room // layer.cost))).values  # no more of them can fit
        pending.append(rest)
    for index in _in_order(pending, prices).tolist():
        if layers[index].cost <= room:
            counts[index] += 1
            room -= layers[index].cost


def _by_density(layers: Sequence[Layer], limit: float, factors: list[float]) -> list[int]:
    """Densities clip(scale · factor, minimum, candidates) with the scale that spends `limit`, rounded to groups."""
    most = [layer.scores.numel() for layer in layers]

    def quotas(scale: float) -> list[float]:
        return [
            min(max(scale * factor * layer.groups, layer.minimum), top)
            for layer, factor, top in zip(layers, factors, most, strict=True)
        ]

    low, high = 0.0, 1.0 / min(factors)
    if _spent(layers, quotas(high)) <= limit:
        low = high
    while low < (middle := (low + high) / 2) < high:  # until the interval is two neighbouring numbers
        low, high = (middle, high) if _spent(layers, quotas(middle)) <= limit else (low, middle)
    exact = quotas(low)
    counts = [max(layer.minimum, math.floor(quota)) for layer, quota in zip(layers, exact, strict=True)]

    # The remainder goes to the layers rounded down most; when cheap layers could take much more, in equal parts.
    room = limit - _spent(layers, counts)
    order = sorted(range(len(layers)), key=lambda index: (counts[index] - exact[index], index))
    while fitting := [index for index in order if counts[index] < most[index] and 0 < layers[index].cost <= room]:
        part = max(1, int(room // math.fsum(layers[index].cost for index in fitting)))
        for index in fitting:
            more = min(part, most[index] - counts[index], int(room // layers[index].cost))
            counts[index] += more
            room -= more * layers[index].cost
    return counts


def _take_the_best_of_each_weight(layers: Sequence[Layer], counts: list[int], limit: float) -> None:
    """Lets the groups of one weight that differ in cost compete for what they have got together."""
    starts = [index for index, layer in enumerate(layers) if not layer.continues]
    for start, end in pairwise([*starts, len(layers)]):
        parts = layers[start:end]
        if len(parts) > 1 and parts[0].cost:  # what is free keeps its density
            counts[start:end] = _by_score(parts, _spent(parts, counts[start:end]))
    _fill_remainder(layers, _prices(layers), counts, limit)


def _spent(layers: Sequence[Layer], counts: Sequence[float]) -> float:
    return math.fsum(count * layer.cost for count, layer in zip(counts, layers, strict=True))
