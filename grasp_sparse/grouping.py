"""A weight as its pattern divides it: the scores of its groups, and what allocation sees of them.

Groups of one weight that differ in size (at edges that the pattern does not divide) are set apart by size, one `Layer` for
each: within a layer of equal groups the kept ones are the highest scores, so counts remain the whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_sparse.allocation import Layer
from grasp_sparse.patterns import GroupPattern, top_k_mask


class GroupedWeight:
    """The scores of one weight, pooled.

    within: bool mask of the weight's shape; groups that are not wholly inside are no candidates.
    """

    def __init__(self, name: str, scores: Tensor, pattern: GroupPattern, within: Tensor | None = None) -> None:
        self.name = name
        self._pattern = pattern
        self._weight = scores
        sizes = pattern.group_size(scores.shape)
        self._sizes = sizes.to(scores.device) if isinstance(sizes, Tensor) else sizes
        self._scores = pattern.pool(scores)
        self._candidates = None if within is None else pattern.pool(within.to(scores.dtype)) == self._sizes
        if within is not None:
            self._scores = self._scores.masked_fill(~self._candidates, -math.inf)
        self.classes = _by_size(self._sizes)

    def layers(self, price: float, min_density: float, min_groups: int) -> list[Layer]:
        """One for each size of groups, the minimum that the weight keeps shared out among them.

        price: of one weight. ValueError if `within` leaves fewer groups than the minimum.
        """
        layers, shape = [], tuple(self._weight.shape)
        for (size, places), minimum in zip(self.classes, self._minima(min_density, min_groups), strict=True):
            scores = self._scores[places]
            candidates = scores if self._candidates is None else scores[self._candidates[places]]
            layers.append(Layer(self.name, candidates, scores.numel(), size * price, minimum, shape, continues=bool(layers)))
        return layers

    def mask(self, counts: Sequence[int]) -> Tensor:
        """The mask that keeps so many groups of each size."""
        kept = torch.empty_like(self._scores, dtype=torch.bool)
        for (_, places), count in zip(self.classes, counts, strict=True):
            kept[places] = top_k_mask(self._scores[places], count)
        return self._pattern.expand(kept, self._weight)

    def _minima(self, min_density: float, min_groups: int) -> list[int]:
        """How many groups of each size are among the best, by score per weight, that make up the minimum of the weight."""
        groups = self._scores.numel()
        candidates = groups if self._candidates is None else int(self._candidates.count_nonzero())
        least = min(groups, min_groups)
        if len(self.classes) == 1:
            minima = [max(least, _rounded_up(min_density * groups))]
            needed = minima[0]
        else:
            order = (self._scores / self._sizes).argsort(descending=True, stable=True)
            filled = self._sizes[order].cumsum(0)
            weights = _rounded_up(min_density * self._weight.numel())
            needed = max(least, int((filled < weights).count_nonzero()) + 1 if weights else 0)
            best = self._sizes[order[:needed]]
            minima = [int((best == size).count_nonzero()) for size, _ in self.classes]
        if candidates < needed:
            raise ValueError(
                f"Expected within to leave {self.name!r} the {needed} groups that min_per_layer and min_density ask for, "
                f"got {candidates}"
            )
        return minima


def most_of_minimum(pattern: GroupPattern, shape: Sequence[int], min_density: float, min_groups: int) -> int:
    """Weights in the minimum of a weight of this shape, whichever groups turn out best: exact where all are of one size."""
    sizes, weights = pattern.group_size(shape), torch.Size(shape).numel()
    if isinstance(sizes, int):
        return min(weights // sizes, max(min_groups, _rounded_up(min_density * (weights // sizes)))) * sizes
    largest = int(sizes.max())
    least = _rounded_up(min_density * weights)
    return min(weights, max(min_groups * largest, least + largest - 1 if least else 0))


def _by_size(sizes: int | Tensor) -> list[tuple[int, slice | Tensor]]:
    """(size, places of the groups that have it), the largest first."""
    if not isinstance(sizes, Tensor):
        return [(sizes, slice(None))]
    return [(size, (sizes == size).nonzero().flatten()) for size in sizes.unique().flip(0).tolist()]


def _rounded_up(count: float) -> int:
    return math.ceil(count - 1e-9)
