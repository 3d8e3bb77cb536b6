"""Masks of every pattern: whole groups, exact counts under every scope and budget, ragged edges by their real weights."""

from __future__ import annotations

import itertools
import math
import random
import warnings

import pytest
import torch
from torch import nn

from grasp_sparse import allocation
from grasp_sparse.allocation import Layer, allocate
from grasp_sparse.criteria import CRITERIA, score
from grasp_sparse.costs import weight_costs
from grasp_sparse.patterns import get_pattern
from grasp_sparse.pruning import make_masks, prune

DIVIDING = {"first": (8, 4, 3, 3), "second": (16, 8, 1, 1), "last": (12, 16)}
RAGGED = {"first": (7, 3, 3, 3), "second": (9, 7, 1, 2), "last": (5, 11)}
COSTS = {"first": 64.0, "second": 16.0, "last": 1.0}
PATTERNS = ("block(2, 2)", "block(4, 3)", "vector(4)", "channel", "channel(in)")
EVERY = ("unstructured", *PATTERNS, "nm(1, 2)")


@pytest.fixture(autouse=True)
def thin_layers_are_no_surprise():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Layers kept below")
        yield


def scores_of(shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def groups_of(pattern, scores):
    """(name, mask of the group, its weights, sum of its scores), one by one."""
    for name, values in scores.items():
        for group in range(pattern.pool(values).numel()):
            mask = pattern.expand(torch.arange(pattern.pool(values).numel()) == group, values)
            yield name, mask, int(mask.sum()), float(values[mask].sum())


def walk(pattern, scores, prices, limit: float, minimum: int = 1, within=None) -> dict[str, torch.Tensor]:
    """The documented rule, one group at a time: the best of each weight, then by score per cost whatever still fits."""
    groups = [group for group in groups_of(pattern, scores) if within is None or not (group[1] & ~within[group[0]]).any()]
    groups.sort(key=lambda group: -group[3] / (group[2] * prices[group[0]]))
    masks = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    first = [g for name in scores for g in [g for g in groups if g[0] == name][:minimum]]
    for group in first:
        masks[group[0]] |= group[1]
        limit -= group[2] * prices[group[0]]
    for name, mask, size, _ in (group for group in groups if not any(group is taken for taken in first)):
        if size * prices[name] <= limit:
            masks[name] |= mask
            limit -= size * prices[name]
    return masks


def is_whole(pattern, mask: torch.Tensor) -> bool:
    """Every group is kept or pruned as one."""
    kept, sizes = pattern.pool(mask.double()), pattern.pool(torch.ones_like(mask, dtype=torch.float64))
    return bool(((kept == 0) | (kept == sizes)).all())


@pytest.mark.parametrize("budget", ["weights", "flops"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.9])
@pytest.mark.parametrize("shapes", [DIVIDING, RAGGED], ids=["dividing", "ragged"])
@pytest.mark.parametrize("written", PATTERNS)
def test_global_is_the_greedy_walk_over_groups_of_any_size(written, shapes, sparsity, budget):
    pattern, scores = get_pattern(written), scores_of(shapes)
    prices = COSTS if budget == "flops" else dict.fromkeys(COSTS, 1.0)
    sizes = {size * prices[name] for name, _, size, _ in groups_of(pattern, scores)}
    if budget == "weights" and len(sizes) == 1:
        limit = round((1 - sparsity) * len(list(groups_of(pattern, scores)))) * sizes.pop()
    else:
        limit = math.floor((1 - sparsity) * sum(prices[name] * values.numel() for name, values in scores.items()) + 1e-9)
    least = sum(min(size * prices[name] for n, _, size, _ in groups_of(pattern, scores) if n == name) for name in scores)
    if limit < 3 * least:
        pytest.skip("too little for one group a layer")
    expected = walk(pattern, scores, prices, limit)
    masks = make_masks(scores, sparsity, written, budget=budget, costs=COSTS)
    assert masks == expected


def assert_exact(pattern, scores, masks, sparsity: float, prices: dict[str, float] | None = None) -> None:
    """Whole groups, none of the weights left out; the exact count, or where groups differ no more than allowed and no group less
    than would fit. `prices`: of a weight of each layer, under a budget of multiply-adds."""
    assert all(is_whole(pattern, mask) and mask.any() for mask in masks.values())
    groups, price = list(groups_of(pattern, scores)), prices or dict.fromkeys(scores, 1.0)
    costs = {size * price[name] for name, _, size, _ in groups}
    total = sum(price[name] * values.numel() for name, values in scores.items())
    spent = sum(price[name] * int(mask.sum()) for name, mask in masks.items())
    if prices is None and len(costs) == 1:
        assert spent == round((1 - sparsity) * len(groups)) * costs.pop()
        return
    assert spent <= (1 - sparsity) * total * (1 + 1e-12)
    room = (1 - sparsity) * total * (1 - 1e-12) - spent
    assert not [name for name, mask, size, _ in groups if size * price[name] <= room and not (mask & masks[name]).any()]


@pytest.mark.parametrize("budget", ["weights", "flops"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("shapes", [DIVIDING, RAGGED], ids=["dividing", "ragged"])
@pytest.mark.parametrize("written", PATTERNS)
def test_groups_are_whole_the_budget_is_met_and_no_further_group_fits(written, shapes, scope, budget):
    pattern, scores = get_pattern(written), scores_of(shapes)
    prices = COSTS if budget == "flops" else dict.fromkeys(COSTS, 1.0)
    for sparsity in (0.0, 0.25, 0.5, 0.6):
        masks = make_masks(scores, sparsity, written, scope, budget, costs=COSTS)
        assert_exact(pattern, scores, masks, sparsity, prices if budget == "flops" else None)


@pytest.mark.parametrize("scope", ["layer", "erk"])
@pytest.mark.parametrize("written", ["block(2, 2)", "vector(4)", "block(8, 3)"])
def test_within_a_weight_the_best_groups_per_weight_are_kept_whatever_their_size(written, scope):
    """A kept group is beaten by no pruned one that costs no more; edges do not compete apart from the rest."""
    shapes = {"a": (33, 17), "b": (21, 35)}
    pattern, scores = get_pattern(written), scores_of(shapes)
    masks = make_masks(scores, 0.8, written, scope)
    for name in shapes:
        own = groups_of(pattern, {name: scores[name]})
        groups = [(size, total / size, bool((mask & masks[name]).any())) for _, mask, size, total in own]
        worst = sorted((mean, size) for size, mean, kept in groups if kept)
        # The last group that fits may be worse than a larger one that did not: as many as there are sizes.
        for mean, size in worst[len({size for size, _, _ in groups}) :]:
            assert not any(other > mean and n <= size for n, other, kept in groups if not kept)


def test_uniform_densities_are_equal_up_to_a_group():
    shapes = {"a": (64, 50), "b": (130, 70), "c": (40, 64)}
    masks = make_masks(scores_of(shapes), 0.75, "block(8, 8)", "layer")
    for name, mask in masks.items():
        assert abs(int(mask.sum()) - 0.25 * mask.numel()) <= 2 * 64, name


def test_minima_count_groups_and_real_weights():
    shapes = {"big": (64, 64), "small": (10, 10)}
    scores = scores_of(shapes)
    scores["small"] -= 100
    pattern, limit = get_pattern("block(4, 4)"), math.floor(0.2 * (64 * 64 + 10 * 10))
    for groups in (1, 3, 7):
        masks = make_masks(scores, 0.8, "block(4, 4)", min_per_layer=groups)
        assert masks == walk(pattern, scores, {"big": 1.0, "small": 1.0}, limit, minimum=groups)
        assert int((pattern.pool(masks["small"].double()) > 0).sum()) >= groups
    for share in (0.01, 0.1, 0.19):
        mask = make_masks(scores, 0.8, "block(4, 4)", min_density=share)["small"]
        assert share * 100 <= int(mask.sum()) < share * 100 + 2 * 16  # up to a group more, and one that still fits
    assert int(make_masks(scores, 0.8, "block(4, 4)", min_per_layer=0)["small"].sum()) == 4  # the corner, which still fits
    assert make_masks(scores, 0.5, "block(4, 4)", min_per_layer=9)["small"].all()


@pytest.mark.parametrize("written", EVERY)
def test_rounds_stay_inside_the_masks_before(written):
    scores, other = scores_of(RAGGED), scores_of(RAGGED, seed=1)
    if written == "nm(1, 2)":
        assert make_masks(other, 0.5, written, within=make_masks(scores, 0.5, written)) == make_masks(scores, 0.5, written)
        return
    before = make_masks(scores, 0.3, written)
    after = make_masks(other, 0.6, written, within=before)
    assert all(not (mask & ~before[name]).any() for name, mask in after.items())
    if written != "unstructured":
        pattern = get_pattern(written)
        limit = math.floor(0.4 * sum(values.numel() for values in other.values()) + 1e-9)
        assert after == walk(pattern, other, dict.fromkeys(other, 1.0), limit, within=before)


def test_groups_that_within_cuts_are_no_candidates():
    scores = {"w": torch.arange(16.0).view(4, 4)}
    within = {"w": torch.ones(4, 4, dtype=torch.bool)}
    within["w"][3, 3] = False
    masks = make_masks(scores, 0.75, "block(2, 2)", within=within)
    assert masks["w"].tolist() == [[False] * 4] * 2 + [[True, True, False, False]] * 2
    with pytest.raises(ValueError, match="'w' the 4 groups that min_per_layer and min_density ask for, got 3"):
        make_masks(scores, 0.0, "block(2, 2)", within=within, min_per_layer=4)
    with pytest.raises(ValueError, match=r"within to leave of every 4 inputs the 3 that pattern nm\(3, 4\) keeps"):
        make_masks(scores, 0.25, "nm(3, 4)", within={"w": torch.arange(4) < torch.full((4, 1), 2)})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 9, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 5)]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("written", EVERY)
def test_every_criterion_under_every_pattern_scope_and_budget(criterion, written):
    model, pattern = net(), get_pattern(written)
    scores, costs = score(model, batches(), criterion, seed=0), weight_costs(model, batches()[0][0])
    sparsity = 0.5 if written == "nm(1, 2)" else 0.7
    for scope, budget in itertools.product(("global", "layer", "erk"), ("weights", "flops")):
        masks = make_masks(scores, sparsity, written, scope, budget, costs=costs)
        masks.check(model)
        assert masks == make_masks(scores, sparsity, pattern, scope, budget, costs=costs)
        assert masks.recipe["pattern"] == pattern.name and masks.recipe["sparsity"] == sparsity
        if written == "nm(1, 2)":  # of three inputs one of two and one of one
            assert [int(mask.sum()) for mask in masks.values()] == [6 * 9 * 2, 9 * 9 * 3, 5 * 18]
        else:
            assert_exact(pattern, scores, masks, sparsity, costs if budget == "flops" else None)


@pytest.mark.parametrize("criterion", ["grasp", "synflow"])
@pytest.mark.parametrize("written", ["block(2, 3)", "channel", "nm(2, 4)"])
def test_prune_in_rounds(criterion, written):
    model = net()
    sparsity = None if written == "nm(2, 4)" else 0.6
    masks = prune(model, batches(), sparsity, criterion, pattern=written, iterations=3)
    masks.check(model)
    if written == "nm(2, 4)":
        assert masks == prune(model, batches(), 0.5, criterion, pattern=get_pattern(written), iterations=3)
        assert [int(mask.sum()) for mask in masks.values()] == [6 * 9 * 2, 9 * 9 * (2 + 1), 5 * 18]
    else:
        assert all(is_whole(get_pattern(written), mask) for mask in masks.values())
        assert masks.sparsity >= 0.6


class TestFixedDensity:
    @pytest.mark.parametrize("sparsity", [0.0, 0.49, 0.75, 0.95])
    def test_another_sparsity_is_refused_before_any_data_is_read(self, sparsity):
        def untouched():
            raise AssertionError("data was read")
            yield

        message = rf"Expected sparsity 0.5, which pattern nm\(2, 4\) fixes, got {sparsity}; leave it out"
        with pytest.raises(ValueError, match=message):
            prune(net(), untouched(), sparsity, pattern="nm(2, 4)")
        with pytest.raises(ValueError, match=message):
            make_masks(scores_of(DIVIDING), sparsity, "nm(2, 4)")

    def test_a_third_can_be_written(self):
        scores = {"w": torch.rand(4, 6)}
        for sparsity in (None, 2 / 3, 1 - 1 / 3, 0.6666667):
            assert make_masks(scores, sparsity, "nm(1, 3)").kept == 8

    def test_a_speedup_or_a_higher_minimum_cannot_be_asked_for(self):
        with pytest.raises(ValueError, match=r"density is open with speedup, got nm\(2, 4\), which fixes 0.5"):
            prune(net(), batches(), pattern="nm(2, 4)", budget="time", speedup=2.0)
        with pytest.raises(ValueError, match=r"min_density of at most 0.5 with pattern nm\(2, 4\), got 0.6"):
            make_masks(scores_of(DIVIDING), pattern="nm(2, 4)", min_density=0.6)
        with pytest.raises(ValueError, match="rule='exact'"):
            make_masks(scores_of(DIVIDING), pattern="nm(2, 4)", rule="paper")


def test_sparsity_is_95_percent_unless_given():
    scores = {"w": torch.randn(40, 50)}
    assert make_masks(scores).kept == 100 and make_masks(scores, pattern="vector(4)").kept == 100


@pytest.mark.parametrize("at_once", [1, 1 << 16])
@pytest.mark.parametrize("scope", ["layer", "erk"])
@pytest.mark.parametrize("seed", range(10))
def test_parts_of_a_weight_share_its_budget(seed, scope, at_once, monkeypatch):
    """The law of `continues`: what a weight has got is spent as a global budget over its parts would be."""
    monkeypatch.setattr(allocation, "_SORTED_AT_ONCE", at_once)
    rng = random.Random(seed)

    def part(cost, continues):
        scores = torch.tensor([rng.gauss(0, 1) for _ in range(rng.randint(5, 30))], dtype=torch.float64) * cost
        return Layer("part", scores, scores.numel(), cost, 0, (20, 20), continues)

    weights = [[part(9.0, False), part(3.0, True), part(1.0, True)] for _ in range(3)]
    layers = [layer for weight in weights for layer in weight]
    total = sum(layer.groups * layer.cost for layer in layers)
    limit = math.floor(rng.uniform(0.1, 0.9) * total)
    counts = allocate(layers, limit, scope)
    pairs = list(zip(counts, layers, strict=True))
    spent = sum(count * layer.cost for count, layer in pairs)
    assert limit - 1 < spent <= limit or all(count == layer.groups for count, layer in pairs if layer.cost == 1)
    for place, weight in enumerate(weights):
        own = counts[3 * place : 3 * place + 3]
        cost = sum(count * layer.cost for count, layer in zip(own, weight, strict=True))
        assert abs(cost / sum(layer.groups * layer.cost for layer in weight) - limit / total) < 0.2
        means = [layer.scores.sort(descending=True).values / layer.cost for layer in weight]
        kept = torch.cat([mean[:count] for mean, count in zip(means, own, strict=True)])
        pruned_small = means[2][own[2] :]  # of the cheapest: each could have stood in for any other
        if kept.numel() > 6 and pruned_small.numel():
            assert pruned_small.max() <= kept.sort().values[6]
