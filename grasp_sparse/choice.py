"""How masks are chosen from scores: the rule, the budget it spends and the minima it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from grasp_sparse.allocation import SCOPES, Layer, allocate
from grasp_sparse.grouping import GroupedWeight, most_of_minimum
from grasp_sparse.patterns import Pattern
from grasp_sparse.patterns.selection import kth_smallest
from grasp_sparse.weights import check_within

BUDGETS = ("weights", "flops", "time")
RULES = ("exact", "paper")
_DEFAULT_SPARSITY = 0.95
_SAME_SHARE = 1e-6


@dataclass(frozen=True)
class Choice:
    """How masks are chosen from scores; fields as the arguments of `make_masks`."""

    sparsity: float
    pattern: Pattern
    scope: str
    budget: str
    min_density: float
    min_per_layer: int
    rule: str

    def check(self, rounds: int = 1) -> None:
        """ValueError for anything that could not work, before time is spent on scores."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"Expected sparsity in [0, 1), got {self.sparsity}")
        if not 0 <= self.min_density <= 1 or self.min_per_layer < 0:
            raise ValueError(
                "Expected min_density in [0, 1] and min_per_layer of at least 0, "
                f"got {self.min_density} and {self.min_per_layer}"
            )
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("budget", self.budget, BUDGETS),
            ("rule", self.rule, RULES),
        ):
            if value not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {value!r}")
        if self.pattern.density is not None and self.min_density > self.pattern.density:
            raise ValueError(
                f"Expected min_density of at most {self.pattern.density:g} with pattern {self.pattern.name}, got {self.min_density}"
            )
        plain = (self.pattern.name, self.scope, self.budget, self.min_density) == ("unstructured", "global", "weights", 0)
        if self.rule == "paper" and not (plain and rounds == 1):
            raise ValueError(
                "Expected pattern='unstructured', scope='global', budget='weights', min_density=0 and one round with "
                f"rule='paper', got {self.pattern.name!r}, {self.scope!r}, {self.budget!r}, {self.min_density} and {rounds}: "
                "pass rule='exact' to combine the paper's scores with them"
            )

    def recipe(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity,
            "pattern": self.pattern.name,
            "scope": self.scope,
            "budget": self.budget,
            "min_density": self.min_density,
            "min_per_layer": self.min_per_layer,
            "rule": self.rule,
            "version": _package_version(),
            "torch": torch.__version__,
        }

    def masks(
        self, scores: Mapping[str, Tensor], costs: Mapping[str, float] | None, within: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if not scores:
            raise ValueError("Expected the scores of at least one weight, got none")
        if within is not None:
            check_within(within, scores)
            if self.rule == "paper":
                raise ValueError("Expected no within with rule='paper', the authors' one cut of all scores, got masks: pass rule='exact'")
        if self.rule == "paper":
            return _paper_masks(scores, self.sparsity)
        if self.pattern.density is not None:
            return {
                name: self.pattern.best(values, 1 - self.sparsity, None if within is None else within[name])
                for name, values in scores.items()
            }
        prices = dict.fromkeys(scores, 1.0) if self.budget == "weights" else _checked_costs(costs, scores)
        weights, layers = [], []
        for name, values in scores.items():
            weights.append(GroupedWeight(name, values, self.pattern, None if within is None else within[name]))
            layers += weights[-1].layers(prices[name], self.min_density, self.min_per_layer)
        counts = iter(allocate(layers, self._limit(layers), self.scope))
        return {weight.name: weight.mask([next(counts) for _ in weight.classes]) for weight in weights}

    def sparsest(self, shapes: Mapping[str, Sequence[int]], prices: Mapping[str, float]) -> float:
        """The largest sparsity that leaves every weight of these shapes its minimum."""
        least = total = 0.0
        for name, shape in shapes.items():
            least += most_of_minimum(self.pattern, shape, self.min_density, self.min_per_layer) * prices[name]
            total += torch.Size(shape).numel() * prices[name]
        return max(0.0, 1 - least / total * (1 + 1e-6) - 1e-9)

    def _limit(self, layers: list[Layer]) -> float:
        groups, prices = sum(layer.groups for layer in layers), {layer.cost for layer in layers}
        if self.budget == "weights" and len(prices) == 1:
            return round((1 - self.sparsity) * groups) * prices.pop()
        # Enough is removed when the removed share, as a floating-point number, is `sparsity`. A limit of
        # (1 - 0.9) · 10 in floating point would be just below one weight.
        enough = (Fraction(math.nextafter(self.sparsity, -1)) + Fraction(self.sparsity)) / 2
        limit = (1 - enough) * sum(layer.groups * Fraction(layer.cost) for layer in layers)
        return float(math.floor(limit) if all(cost == int(cost) for cost in prices) else limit)


def plain_number(value: Any) -> Any:
    """A number of numpy, or a tensor of one, as Python's own, which json can write; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def sparsity_under(pattern: Pattern, sparsity: float | None) -> float:
    """The sparsity that is meant: what the pattern fixes, else what was asked for, else 0.95.

    ValueError if something else was asked for than the pattern fixes.
    """
    if pattern.density is None:
        return float(_DEFAULT_SPARSITY if sparsity is None else sparsity)
    fixed = 1 - pattern.density
    if sparsity is not None and abs(sparsity - fixed) > _SAME_SHARE:
        raise ValueError(
            f"Expected sparsity {fixed:g}, which pattern {pattern.name} fixes, got {sparsity}; leave it out or choose another pattern"
        )
    return fixed


def _checked_costs(costs: Mapping[str, float] | None, scores: Mapping[str, Tensor]) -> Mapping[str, float]:
    if costs is None:
        raise ValueError(
            "Expected costs with a budget of flops or time, got None: pass costs=weight_costs(model, example_input), or seconds"
        )
    if missing := [name for name in scores if name not in costs]:
        raise ValueError(f"Expected a cost for every weight, got none for {', '.join(missing[:5])}")
    if bad := [name for name in scores if not (0 <= costs[name] < math.inf)]:
        raise ValueError(f"Expected finite costs of at least 0, got {costs[bad[0]]} for {bad[0]!r}")
    if not any(costs[name] for name in scores):
        raise ValueError("Expected at least one weight that costs something, got only zeros")
    return costs


def _paper_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    every = torch.cat([values.flatten() for values in scores.values()])
    density = 1 - sparsity  # two roundings instead of none: what the authors' code counts with
    removed = int(every.numel() * (1 - density))
    # The k-th highest of S = −score is the k-th lowest score.
    threshold = kth_smallest(every, removed) if removed else every.min()
    return {name: values >= threshold for name, values in scores.items()}


def _package_version() -> str:
    try:
        return version("grasp_sparse")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
