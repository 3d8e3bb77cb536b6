"""How far layers and networks can be pruned: a small layer has few blocks, and keeps one of them at least."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from benchmarks.gpu_shapes import PATTERNS, GpuNetwork, LayerCase, StepCase
from benchmarks.shapes import Shape
from grasp_sparse.choice import Choice
from grasp_sparse.costs import weight_costs
from grasp_sparse.formats import block_grid
from grasp_sparse.patterns import get_pattern

_NAMED = 6  # of what cannot be


def layer_can(shape: Shape, pattern: str, sparsity: float) -> bool:
    """Whether so much can be pruned of one layer."""
    block_size = PATTERNS[pattern]
    return block_size is None or round((1 - sparsity) * math.prod(block_grid(shape.weight_shape, block_size))) > 0


def sparsest(network: GpuNetwork, pattern: str) -> float:
    """The largest share of a network's multiply-adds that can be pruned."""
    shapes, costs = _weights(network)
    least = Choice(
        sparsity=0.0, pattern=get_pattern(pattern), scope="global", budget="flops", min_density=0.0, min_per_layer=1, rule="exact"
    )
    return least.sparsest(shapes, costs)


@functools.cache
def _weights(network: GpuNetwork) -> tuple[dict[str, torch.Size], dict[str, float]]:
    """Shapes of the weights that are pruned, and what each of their numbers costs."""
    with torch.device("meta"):
        model = network.make()
        costs = weight_costs(model, torch.empty(1, 3, network.side, network.side))
    return {name: weight.shape for name, weight in model.named_parameters() if name in costs}, costs


def possible_layers(cases: Sequence[LayerCase]) -> tuple[list[LayerCase], list[str]]:
    """The cases with what they can have; and a line about the rest, if there is any."""
    possible, never = [], []
    for case in cases:
        can = [combination for combination in case.together if layer_can(case.shape, *combination)]
        cannot = [combination for combination in case.together if combination not in can]
        never += [f"{case.group} {case.shape} {pattern} {sparsity:.0%}" for pattern, sparsity in cannot]
        if can:
            possible.append(case._replace(together=can))
    return possible, _line(list(dict.fromkeys(never)))


def possible_steps(cases: Sequence[StepCase]) -> tuple[list[StepCase], list[str]]:
    """The cases that can be; and a line about the others, if there are any."""
    possible = [case for case in cases if case.sparsity <= sparsest(case.network, case.pattern)]
    return possible, _line([str(case) for case in cases if case not in possible])


def _line(never: list[str]) -> list[str]:
    more = f"; and {len(never) - _NAMED} more" * (len(never) > _NAMED)
    return [f"not measured, for a layer would keep no block: {'; '.join(never[:_NAMED])}{more}"] if never else []
