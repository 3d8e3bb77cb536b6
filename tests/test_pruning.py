"""Masks from scores: exact budgets, the best kept, determinism; and prune as score + make_masks, in one round or many."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from grasp_sparse.costs import weight_costs
from grasp_sparse.criteria import CRITERIA, score
from grasp_sparse.masks import MaskSet
from grasp_sparse.pruning import make_masks, prune

COSTS = {"first": 64.0, "second": 16.0, "third": 4.0, "last": 1.0}


def scores_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (6, 3, 3, 3), "second": (8, 6, 3, 3), "third": (16, 8, 3, 3), "last": (10, 16)}
    scores = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for exponent, name in enumerate(scores):
        if kind == "positive":
            scores[name] = scores[name].abs()
        elif kind == "scales":
            scores[name] *= 1e-30 * 10.0 ** (15 * exponent)
        elif kind == "ties":
            scores[name] = scores[name].round()
        elif kind == "constant":
            scores[name] = torch.ones_like(scores[name])
    return scores


KINDS = ("signed", "positive", "scales", "ties", "constant")


@pytest.fixture(autouse=True)
def thin_layers_are_no_surprise():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Layers kept below")
        yield


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def batches(samples: int = 20) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(samples) % 5)]


def test_literal_example():
    scores = {"a": torch.tensor([[5.0, 1.0], [4.0, -2.0]]), "b": torch.tensor([[3.0, 3.0], [3.0, 0.0]])}
    masks = make_masks(scores, 0.5)
    assert masks["a"].tolist() == [[True, False], [True, False]]
    assert masks["b"].tolist() == [[True, True], [False, False]]  # ties: the lower index
    # b costs 3 a weight: per cost 5 4 | 1 1 1 | 1 ..., a limit of 8 buys 5, 4, then 1 (larger score at equal ratio first: b).
    masks = make_masks(scores, 0.5, budget="flops", costs={"a": 1, "b": 3})
    assert masks["a"].tolist() == [[True, False], [True, False]] and masks["b"].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_exactly_round_density_n_weights_are_kept_and_no_layer_is_emptied(kind, sparsity, scope):
    masks = make_masks(scores_of(kind), sparsity, scope=scope)
    assert masks.kept == round((1 - sparsity) * masks.numel)
    assert all(mask.any() for mask in masks.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("min_density", [0.0, 0.01])
def test_flops_budget_is_never_exceeded_and_no_further_weight_fits(kind, sparsity, scope, min_density):
    scores = scores_of(kind)
    masks = make_masks(scores, sparsity, scope=scope, budget="flops", costs=COSTS, min_density=min_density)
    total = sum(COSTS[name] * value.numel() for name, value in scores.items())
    spent = sum(COSTS[name] * int(mask.sum()) for name, mask in masks.items())
    assert masks.flop_sparsity(COSTS) >= sparsity
    fitting = [n for n, mask in masks.items() if not mask.all() and (total - spent - COSTS[n]) / total >= sparsity]
    assert not fitting
    for name, mask in masks.items():
        assert int(mask.sum()) >= max(1, min_density * mask.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["weights", "flops"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_larger_score_is_never_dropped_while_a_smaller_one_of_equal_cost_is_kept(kind, budget, dtype):
    costs = {**COSTS, "third": COSTS["second"]}
    scores = {name: value.to(dtype) for name, value in scores_of(kind).items()}
    masks = make_masks(scores, 0.8, budget=budget, costs=costs, min_per_layer=0)
    for group in [list(scores)] if budget == "weights" else [["first"], ["second", "third"], ["last"]]:
        kept = torch.cat([scores[name][masks[name]] for name in group])
        dropped = torch.cat([scores[name][~masks[name]] for name in group])
        if kept.numel() and dropped.numel():
            assert dropped.max() <= kept.min()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_costs_make_the_flops_budget_the_weights_budget(kind):
    scores = scores_of(kind)
    costs = dict.fromkeys(scores, 49.0)
    n = sum(value.numel() for value in scores.values())
    for kept in (10, n // 3, n - 5):
        sparsity = (n - kept) / n
        assert make_masks(scores, sparsity) == make_masks(scores, sparsity, budget="flops", costs=costs)


def test_a_decimal_share_buys_what_it_says():
    scores = {"a": torch.arange(100.0), "b": torch.arange(100.0)}
    assert make_masks(scores, 0.9, budget="flops", costs={"a": 1, "b": 1}).kept == 20  # not 19 by 1 - 0.9 < 0.1


def test_flops_budget_favours_cheap_weights_of_equal_score():
    masks = make_masks(scores_of("constant"), 0.9, budget="flops", costs=COSTS)
    assert masks["last"].all() and masks["first"].sum() == 1


def test_min_density_takes_from_the_others_and_rounds_up():
    scores = {"big": torch.arange(1000.0) + 100, "small": torch.rand(33)}
    masks = make_masks(scores, 0.8, min_density=0.1)
    assert masks["small"].sum() == 4 and masks.kept == round(0.2 * 1033)
    assert make_masks(scores, 0.8)["small"].sum() == 1
    assert make_masks(scores, 0.8, min_per_layer=0)["small"].sum() == 0


def test_thin_layers_are_named_in_a_warning():
    scores = {"big": torch.rand(5000) + 1, "thin": torch.rand(5000)}
    with pytest.warns(UserWarning, match=r"thin \(0\.020%\)"):
        make_masks(scores, 0.9)


@pytest.mark.parametrize(("kept", "warned"), [(20, False), (10, False), (9, True), (5, True)])
def test_thin_is_below_a_thousandth(kept, warned):
    scores = {"big": torch.rand(10000), "layer": torch.cat([torch.full((kept,), 2.0), torch.full((10000 - kept,), -1.0)])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = make_masks(scores, 0.75)
    assert masks["layer"].sum() == kept
    assert [str(w.message).partition(":")[0] for w in caught] == ["Layers kept below 0.1%"] * warned


@pytest.mark.parametrize("kept_by", ["tie", "rank"])
def test_paper_rule_keeps_everything_up_to_the_threshold(kept_by):
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 2.0 if kept_by == "tie" else 1.5, 1.0, 0.0, -1.0, -2.0, -3.0])
    masks = make_masks({"a": values}, 0.6, rule="paper")
    # k = int(10 · 0.6) = 6 highest of −score: the sixth is the threshold, it and its ties survive.
    assert masks["a"].tolist() == [True] * 5 + [False] * 5
    assert make_masks({"a": values}, 0.7, rule="paper").kept == (5 if kept_by == "tie" else 4)
    assert make_masks({"a": values}, 0.0, rule="paper").kept == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": float("nan")}, r"\[0, 1\)"),
        ({"sparsity": 0.999}, "min_per_layer"),
        ({"sparsity": 0.9, "min_density": 0.5}, "min_density"),
        ({"min_density": 1.5}, "min_density"),
        ({"min_per_layer": -1}, "min_per_layer"),
        ({"scope": "locally"}, "locally"),
        ({"budget": "seconds"}, "seconds"),
        ({"rule": "loose"}, "loose"),
        ({"pattern": "zebra"}, "zebra"),
        ({"budget": "flops"}, "weight_costs"),
        ({"budget": "flops", "costs": {"first": 1}}, "second"),
        ({"budget": "flops", "costs": {**COSTS, "last": -1.0}}, "-1.0 for 'last'"),
        ({"budget": "flops", "costs": dict.fromkeys(COSTS, 0.0)}, "only zeros"),
        ({"within": {"first": torch.ones(2, 2, dtype=torch.bool)}}, "same shape.* 'first'"),
        ({"within": {name: torch.ones_like(value) for name, value in scores_of("signed").items()}}, "bool mask.*float32"),
        ({"within": dict.fromkeys(scores_of("signed"), [True])}, "bool mask.*list"),
        ({"rule": "paper", "scope": "erk"}, "rule='exact'"),
        ({"rule": "paper", "budget": "flops", "costs": COSTS}, "rule='exact'"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_masks(scores_of("signed"), **{"sparsity": 0.9, **options})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_the_layer(bad):
    scores = scores_of("signed")
    scores["third"][0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="'third'"):
        make_masks(scores, 0.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), "Expected floating-point scores.*'bad', got torch.bool"),
        (torch.ones(2, 3, dtype=torch.int64), "Expected floating-point scores.*'bad', got torch.int64"),
        ([[1.0, 2.0]], "Expected floating-point scores.*'bad', got list"),
        (torch.ones(5, 0), r"at least one weight, got shape \[5, 0\] for 'bad'"),
    ],
)
def test_scores_of_the_wrong_kind_name_the_layer(bad, message):
    with pytest.raises(ValueError, match=message):
        make_masks({"good": torch.rand(4, 4), "bad": bad}, 0.5)


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("candidates", [0, 2])
def test_within_must_leave_every_layer_its_minimum(scope, candidates):
    scores = scores_of("signed")
    within = {name: torch.ones_like(value, dtype=torch.bool) for name, value in scores.items()}
    within["third"] = (torch.arange(scores["third"].numel()) < candidates).view_as(scores["third"])
    with pytest.raises(ValueError, match=f"'third' the 3 groups.*got {candidates}"):
        make_masks(scores, 0.9, scope=scope, within=within, min_per_layer=3)
    masks = make_masks(scores, 0.9, scope=scope, within=within, min_per_layer=candidates)
    assert masks["third"].sum() <= candidates


def test_a_layer_smaller_than_min_per_layer_is_kept_whole():
    masks = make_masks({"big": torch.rand(100) + 1, "small": torch.rand(3)}, 0.5, min_per_layer=5)
    assert masks["small"].all()


@pytest.mark.parametrize(("wrap", "path"), [(torch.compile, "model"), (lambda m: nn.Sequential(torch.compile(m)), "model.0")])
@pytest.mark.parametrize("call", [score, prune])
def test_a_compiled_model_is_refused_before_any_data_is_read(call, wrap, path):
    def untouched():
        raise AssertionError("data was read")
        yield

    with pytest.raises(ValueError, match=rf"use {path}\._orig_mod"):
        call(wrap(net()), untouched())


def test_a_model_compiled_in_place_scores_as_the_plain_one():
    model, compiled = net(), net()
    compiled.compile()
    assert prune(compiled, batches(), 0.8) == prune(model, batches(), 0.8)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("budget", ["weights", "flops"])
def test_every_criterion_meets_every_budget_and_again_the_same(criterion, budget):
    model = net()
    masks = prune(model, batches(), 0.9, criterion, budget=budget, iterations=3, seed=1)
    assert masks == prune(model, batches(), 0.9, criterion, budget=budget, iterations=3, seed=1)
    masks.check(model)
    if budget == "weights":
        assert masks.kept == round((1 - 0.9) * masks.numel)
    else:
        costs = weight_costs(model, batches()[0][0])
        assert 0.9 <= masks.flop_sparsity(costs) < 0.9 + 36 / sum(costs[name] * mask.numel() for name, mask in masks.items())
    assert masks.recipe["criterion"] == criterion and masks.recipe["iterations"] == 3 and masks.recipe["budget"] == budget


def test_one_round_is_score_and_make_masks():
    model = net()
    model[1].eps = 1e-3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(40)[0]), batch_size=8, shuffle=True)
    options = {"seed": 4, "num_batches": 2, "redraw": "all"}
    assert prune(model, loader, 0.8, scope="erk", **options) == make_masks(score(model, loader, **options), 0.8, scope="erk")


def test_synflow_in_rounds_never_cuts_a_path_the_published_way():
    """Restated: 100 rounds, score of the masked network, density^(k/100) kept globally after round k."""
    torch.manual_seed(0)
    sizes = ((20, 30), (30, 30), (30, 4))
    model = nn.Sequential(*[layer for size in sizes for layer in (nn.Linear(*size, bias=False), nn.ReLU())])
    weights = [model[i].weight.detach().double().abs() for i in (0, 2, 4)]
    masks = [torch.ones_like(w) for w in weights]
    for k in range(1, 101):
        a, b, c = (w * m for w, m in zip(weights, masks, strict=True))
        flow_in, flow_mid = a.sum(1), b @ a.sum(1)
        out_mid, out_in = c.sum(0), b.T @ c.sum(0)
        scored = [a * out_in[:, None], b * out_mid[:, None] * flow_in, c * flow_mid]
        flat = torch.cat([s.flatten() for s in scored])
        cut = flat.sort(descending=True).values[round(flat.numel() * 0.05 ** (k / 100)) - 1]
        masks = [(s >= cut).double() for s in scored]
    got = prune(model, [(torch.randn(2, 20), torch.zeros(2))], 0.95, "synflow")
    assert got.recipe["iterations"] == 100
    agree = sum(int((mask == expected.bool()).sum()) for mask, expected in zip(got.values(), masks, strict=True))
    assert agree >= got.numel - 2


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("budget", ["weights", "flops"])
def test_rounds_stay_inside_the_masks_before(scope, budget):
    scores, other = scores_of("signed"), scores_of("signed", seed=1)
    options = {"scope": scope, "budget": budget, "costs": COSTS}
    before = make_masks(scores, 0.5, **options)
    after = make_masks(other, 0.9, within=before, **options)
    assert all(not (mask & ~before[name]).any() for name, mask in after.items())
    if budget == "weights":
        assert after.kept == round((1 - 0.9) * after.numel)
    else:
        assert 0.9 <= after.flop_sparsity(COSTS) < 0.91


def test_prune_leaves_the_model_alone_and_says_what_it_did(tmp_path):
    model = net()
    state, rng = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    options = {"exclude": ["0", "3"], "temperature": 100.0, "seed": 0}
    masks = prune(model, batches(), 0.9, iterations=2, loss_fn=nn.functional.cross_entropy, **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert list(masks) == ["6.weight"] and ("3", "excluded by the caller") in masks.skipped
    expected = {"criterion": "grasp", "loss_fn": "cross_entropy", "sparsity": 0.9, **options}
    assert expected.items() <= masks.recipe.items() and {"version", "torch", "pattern"} <= masks.recipe.keys()
    masks.save(tmp_path / "masks")
    assert MaskSet.load(tmp_path / "masks").recipe == masks.recipe


def test_a_generator_of_batches_serves_all_rounds():
    assert prune(net(), (batch for batch in batches()), 0.9, "snip", iterations=4, budget="flops").sparsity > 0


def test_data_free_criteria_need_an_example_only_for_compute():
    model = net()
    assert prune(model, sparsity=0.5, criterion="magnitude").density == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="example_input"):
        prune(model, sparsity=0.5, criterion="magnitude", budget="flops")
    by_example = prune(model, None, 0.5, "magnitude", budget="flops", example_input=batches()[0][0])
    assert by_example == prune(model, batches(), 0.5, "magnitude", budget="flops")


@pytest.mark.parametrize(
    "options", [{"sparsity": 1.0}, {"iterations": 0}, {"criterion": "x"}, {"scope": "x"}, {"preset": "paper", "iterations": 2}]
)
def test_prune_refuses_before_it_reads_any_data(options):
    def untouched():
        raise AssertionError("data was read")
        yield

    with pytest.raises(ValueError):
        prune(net(), untouched(), **options)


def test_paper_preset_can_be_combined_with_the_exact_rule():
    masks = prune(net(), batches(), 0.9, preset="paper", rule="exact", budget="flops")
    assert masks.recipe["preset"] == "paper" and masks.recipe["rule"] == "exact"


def test_numbers_of_numpy_are_numbers(tmp_path):
    numbers = {"min_density": 0.25, "min_per_layer": 2, "iterations": 2, "seed": 3, "temperature": 100.0, "num_batches": 1}
    kinds = {int: np.int64, float: np.float32}
    plain = prune(net(), batches(), 0.5, "grasp", **numbers)
    masks = prune(net(), batches(), np.float32(0.5), "grasp", **{name: kinds[type(value)](value) for name, value in numbers.items()})
    assert masks == plain and masks.recipe == plain.recipe
    masks.save(tmp_path / "masks")
    assert MaskSet.load(tmp_path / "masks").recipe == plain.recipe
    made = make_masks(scores_of("signed"), np.float64(0.5), min_density=np.float32(0.25), min_per_layer=np.int64(2))
    made.save(tmp_path / "made")
    assert MaskSet.load(tmp_path / "made").recipe["min_per_layer"] == 2
    seeded = prune(net(), None, 0.5, "random", seed=torch.tensor(3))
    assert seeded == prune(net(), None, 0.5, "random", seed=3) and seeded.recipe["seed"] == 3
