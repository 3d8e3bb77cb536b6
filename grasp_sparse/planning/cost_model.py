"""Seconds a layer takes by the number of weights it keeps: a fixed part and so much per weight, until masked is faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from grasp_sparse.masks import MaskSet
from grasp_sparse.patterns import GroupPattern, Unstructured
from grasp_sparse.planning import cache
from grasp_sparse.planning.inputs import layer_inputs
from grasp_sparse.planning.layer_times import calls_of, fastest_times, measure_all
from grasp_sparse.planning.plan import decided_by_example
from grasp_sparse.targets import find_targets

# Where the time of the sparse kernels is measured to draw a line through it.
DENSITIES = (0.01, 0.05, 0.2)

# A line through noise may fall. A weight that seemed to cost nothing would never be pruned, so it costs this share of what
# a weight of the dense layer costs.
_LEAST_SLOPE = 0.01


class LayerCost(NamedTuple):
    """Seconds of forward + backward of all layers of one weight, in all their calls in one step."""

    weights: int
    dense: float
    masked: float
    fixed: float
    slope: float  # per kept weight

    def seconds(self, kept: int) -> float:
        """What the layers take when ``kept`` weights are left and they run the faster way."""
        if kept == self.weights:
            return self.dense
        return min(self.masked, self.fixed + self.slope * kept)


def layer_costs(
    model: nn.Module, names: Iterable[str], example_input: Any, pattern: GroupPattern = Unstructured()
) -> dict[str, LayerCost]:
    """The costs of the weights called ``names``, measured at random masks of three densities on inputs like their own.

    The masks are of ``pattern``, and layers store what is fastest under it.
    ``example_input`` as for ``plan``. A weight whose layers the example does not call, or that can only run masked, costs
    nothing by the weight.
    """
    parameters = dict(model.named_parameters())
    inputs = layer_inputs(model, example_input)
    generator = torch.Generator().manual_seed(0)
    measured: dict[str, list[tuple[int, float]]] = {}
    costs = {}
    called = []
    for density in DENSITIES:
        masks = {name: _random_mask(parameters[name], density, generator, pattern) for name in names}
        targets = decided_by_example(find_targets(model, MaskSet(masks, {"pattern": pattern.name})), inputs)
        called += [(target, calls_of(target, inputs)) for target in targets]
    measure_all(called)
    for target, calls in called:
        name, weights = target.names[0], target.mask.numel()
        if not calls:
            costs[name] = LayerCost(weights, 0.0, 0.0, 0.0, 0.0)
            continue
        times, _, _ = fastest_times(target, calls)
        line = measured.setdefault(name, [])
        line.append((target.kept, times.sparse))
        fixed, slope = (times.masked, 0.0) if target.runs == "masked" else _line(line)
        if target.runs != "masked":
            slope = max(slope, _LEAST_SLOPE * times.dense / weights)
        before = costs.get(name)
        dense, masked = (min(getattr(times, part), getattr(before or times, part)) for part in ("dense", "masked"))
        costs[name] = LayerCost(weights, dense, masked, max(0.0, fixed), slope)
    cache.save()
    return costs


def _random_mask(weight: nn.Parameter, density: float, generator: torch.Generator, pattern: GroupPattern) -> torch.Tensor:
    groups = pattern.pool(weight.detach()).numel()
    kept = min(max(1, round(density * groups)), groups - 1)
    mask = torch.zeros(groups, dtype=torch.bool)
    mask[torch.randperm(groups, generator=generator)[:kept]] = True
    return pattern.expand(mask, weight)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(value at 0, slope) of the line through (kept, seconds) with the least squares of relative errors."""
    shares = [1 / seconds**2 for _, seconds in points]
    total = sum(shares)
    x = sum(share * kept for share, (kept, _) in zip(shares, points, strict=True)) / total
    y = sum(share * seconds for share, (_, seconds) in zip(shares, points, strict=True)) / total
    spread = sum(share * (kept - x) ** 2 for share, (kept, _) in zip(shares, points, strict=True))
    if spread == 0:
        return y, 0.0
    slope = sum(share * (kept - x) * (seconds - y) for share, (kept, seconds) in zip(shares, points, strict=True)) / spread
    return y - slope * x, slope
