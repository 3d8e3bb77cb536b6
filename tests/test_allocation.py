"""Counts per layer: greedy by score per cost, exact, maximal; densities for the uniform and ERK scopes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from grasp_sparse import allocation
from grasp_sparse.allocation import Layer, allocate, erk_factor


def layer(scores, cost=1.0, minimum=0, shape=None) -> Layer:
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return Layer("layer", scores, scores.numel(), cost, minimum, shape or (scores.numel(), 1))


def walk(layers: list[Layer], limit: float) -> list[int]:
    """The documented fill rule, one group at a time."""
    counts, room, rest = [0] * len(layers), limit, []
    for index, each in enumerate(layers):
        ranked = sorted(range(each.groups), key=lambda i: (-float(each.scores[i]), i))
        counts[index] = each.minimum
        room -= each.minimum * each.cost
        for i in ranked[each.minimum :]:
            value = float(each.scores[i])
            rest.append((-math.inf if each.cost == 0 else -value / each.cost, -value, index, i))
    for _, _, index, _ in sorted(rest):
        if layers[index].cost <= room:
            counts[index] += 1
            room -= layers[index].cost
    return counts


def random_layers(rng: random.Random, costs) -> list[Layer]:
    return [
        layer(
            [rng.choice((rng.gauss(0, 1), rng.randint(-2, 2))) * 10.0 ** rng.randint(-6, 6) for _ in range(rng.randint(1, 9))],
            cost=rng.choice(costs),
            minimum=rng.randint(0, 1),
        )
        for _ in range(rng.randint(1, 4))
    ]


@pytest.mark.parametrize("at_once", [1, 1 << 16])
@pytest.mark.parametrize("seed", range(60))
def test_global_is_the_greedy_walk_and_maximal(seed, at_once, monkeypatch):
    monkeypatch.setattr(allocation, "_SORTED_AT_ONCE", at_once)  # 1: the quickselect decides everything
    rng = random.Random(seed)
    layers = random_layers(rng, (1, 4, 9, 100) if seed % 3 else (1,)) + [layer([1.0], cost=1)]
    total = sum(each.groups * each.cost for each in layers)
    limit = max(round(rng.random() * total), sum(each.minimum * each.cost for each in layers))
    counts = allocate(layers, limit)
    assert counts == walk(layers, limit)
    spent = sum(count * each.cost for count, each in zip(counts, layers, strict=True))
    assert spent <= limit
    assert all(spent + each.cost > limit for count, each in zip(counts, layers, strict=True) if count < each.groups)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_equal_or_lower_cost_beats_it_by_more_than_the_group_at_the_cut(seed):
    rng = random.Random(seed)
    layers = [layer([abs(rng.gauss(0, 1)) for _ in range(4)], cost=c) for c in (1, 3, 7)]
    limit = rng.randint(5, 40)
    items = [(float(s), each.cost) for each in layers for s in each.scores]
    best = max(
        sum(s for (s, _), chosen in zip(items, bits, strict=True) if chosen)
        for bits in itertools.product((0, 1), repeat=len(items))
        if sum(c for (_, c), chosen in zip(items, bits, strict=True) if chosen) <= limit
    )
    counts = allocate(layers, limit)
    got = sum(float(each.scores.sort(descending=True).values[:n].sum()) for each, n in zip(layers, counts, strict=True))
    assert best - max(s for s, _ in items) <= got <= best + 1e-12


def test_equal_costs_are_one_ranking_whatever_the_cost():
    scores = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = torch.cat(scores).sort(descending=True).values[41]
    for cost in (1, 3, 1024):
        counts = allocate([layer(s, cost) for s in scores], 42 * cost)
        assert counts == [int((s >= expected).sum()) for s in scores]


def test_scores_of_very_different_scale_and_many_ties_are_solved_exactly(monkeypatch):
    monkeypatch.setattr(allocation, "_SORTED_AT_ONCE", 10)
    layers = [
        layer([1e300] * 30 + [1e-300] * 30, 1024),
        layer([0.0] * 100, 1),
        layer([-1e-300] * 20 + [1e38] * 20, 49),
    ]
    total = sum(each.groups * each.cost for each in layers)
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.97, 1.0):
        assert allocate(layers, share * total) == walk(layers, share * total)


def test_minima_are_taken_from_the_others():
    layers = [layer([9, 8, 7, 6]), layer([3, 2, 1, 0], minimum=2)]
    assert allocate(layers, 4) == [2, 2]
    assert allocate([layers[0], layer([3, 2, 1, 0])], 4) == [4, 0]


def test_free_groups_are_kept():
    assert allocate([layer([1, 2], cost=0), layer([5, 6], cost=2)], 2) == [2, 1]


def test_minima_beyond_the_budget_and_unknown_scopes_are_refused():
    with pytest.raises(ValueError, match="min_density"):
        allocate([layer([1, 2], minimum=2)], 1)
    with pytest.raises(ValueError, match="'local'"):
        allocate([layer([1, 2])], 1, "local")


def test_uniform_gives_the_same_density_and_the_remainder_to_the_largest_fraction():
    layers = [layer(range(n)) for n in (100, 50, 7)]
    assert allocate(layers, 16, "layer") == [10, 5, 1]  # quotas 10.19, 5.10, 0.71
    assert sum(allocate(layers, 79, "layer")) == 79


def test_uniform_under_compute_has_one_density_and_is_maximal():
    layers = [layer(range(1000), cost=100), layer(range(5000), cost=10), layer(range(9000), cost=1)]
    limit = 0.1 * sum(each.groups * each.cost for each in layers)
    counts = allocate(layers, limit, "layer")
    assert counts == [100, 500, 900]
    counts = allocate(layers, limit + 57, "layer")
    assert sum(n * each.cost for n, each in zip(counts, layers, strict=True)) == limit + 57


def test_erk_factor_of_conv_and_linear():
    assert erk_factor((64, 32, 3, 3)) == pytest.approx((64 + 32 + 3 + 3) / (64 * 32 * 9))
    assert erk_factor((10, 20)) == pytest.approx(30 / 200)


@pytest.mark.parametrize("budget", ["weights", "flops"])
def test_erk_densities_are_proportional_until_a_layer_is_dense(budget):
    shapes = [(16, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (100, 128)]
    costs = [1024, 256, 64, 1] if budget == "flops" else [1, 1, 1, 1]
    layers = [layer(range(math.prod(s)), cost=c, shape=s) for s, c in zip(shapes, costs, strict=True)]
    total = sum(each.groups * each.cost for each in layers)
    for share in (0.03, 0.2, 0.6, 0.95):
        counts = allocate(layers, int(share * total), "erk")
        densities = [n / each.groups for n, each in zip(counts, layers, strict=True)]
        ratios = [d / erk_factor(s) for d, s in zip(densities, shapes, strict=True)]
        partial = [r for r, d in zip(ratios, densities, strict=True) if d < 1]
        assert max(partial) <= min(partial) * 1.05  # whole groups only
        assert all(r <= max(partial) * 1.001 for r, d in zip(ratios, densities, strict=True) if d == 1)
        spent = sum(n * each.cost for n, each in zip(counts, layers, strict=True))
        assert spent <= int(share * total) < spent + min(c for c, d in zip(costs, densities, strict=True) if d < 1)


@pytest.mark.parametrize("scope", ["layer", "erk"])
def test_densities_respect_minima_and_candidates_and_meet_the_budget(scope):
    layers = [
        Layer("a", torch.rand(40), 400, 1.0, 30, (20, 20)),
        Layer("b", torch.rand(900), 900, 1.0, 1, (30, 30)),
        Layer("c", torch.rand(5), 5, 1.0, 1, (5, 1)),
    ]
    for limit in (32, 60, 300, 945):
        counts = allocate(layers, limit, scope)
        assert sum(counts) == limit
        assert all(each.minimum <= n <= each.scores.numel() for n, each in zip(counts, layers, strict=True))
