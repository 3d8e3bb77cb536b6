"""From scores to masks: `make_masks`, and `prune` = score + make_masks, in one round or many."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.choice import Choice, plain_number, sparsity_under
from grasp_sparse.costs import weight_costs
from grasp_sparse.criteria import check_scores, check_uncompiled, get_criterion, score, store_batches
from grasp_sparse.criteria.batches import Batch
from grasp_sparse.criteria.loss import LossFn, Reduce
from grasp_sparse.forwards import check_forwards
from grasp_sparse.masks import MaskSet
from grasp_sparse.patterns import Pattern, get_pattern
from grasp_sparse.scratch import preserved_rng
from grasp_sparse.weights import Selector, find_weights

_NEARLY_EMPTY = 1e-3
_BATCH_OPTIONS = ("num_batches", "samples_per_class", "num_classes", "micro_batch_size")

# How `prune` finds masks for a speedup. Measuring needs sparse layers, which stand below this module: grasp_sparse.speedup,
# which the package always imports, puts its `fit_speedup` here.
time_search: Callable[..., MaskSet] | None = None


def make_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    scope: str = "global",
    budget: str = "weights",
    *,
    costs: Mapping[str, float] | None = None,
    min_density: float = 0.0,
    min_per_layer: int = 1,
    rule: str = "exact",
    within: Mapping[str, Tensor] | None = None,
    recipe: Mapping[str, Any] | None = None,
    skipped: Iterable[tuple[str, str]] = (),
) -> MaskSet:
    """Keeps the best-scored weights under a budget; among equal scores the first layer and index win.

    sparsity: in [0, 1), 0.95 unless given. The share removed of the weights (exactly round((1 - sparsity)·n) are kept), or, with
        budget="flops", of the multiply-adds: never less is removed, and no further weight would fit. `costs` from
        `weight_costs` is then required; with budget="time" `costs` in seconds per weight.
    pattern: what is kept or pruned together: "unstructured", "block(32, 32)", "vector(8)", "nm(2, 4)", "channel", or an object
        of grasp_sparse.patterns. For weights read groups: exactly round((1 - sparsity)·groups) are kept where all are of one
        size; where sizes differ, never less is removed and no further group would fit. With nm(n, m) the density of every
        layer is n / m: sparsity is 1 - n / m or left out, and scope and budget have nothing to decide.
    scope: "global" one ranking over all layers, "layer" the same density everywhere, "erk"; see allocation.py.
    min_density, min_per_layer: every layer keeps at least this share (rounded up) and this many; others give way, the
        budget is met all the same. `min_per_layer=0` lets layers become empty.
    rule: "paper" keeps what the authors' code keeps: with k = int(n·sparsity), everything up to the k-th highest of
        −score, so n − k + 1 weights and ties, and no guard against empty layers. Only for a plain global weight budget.
    within: bool masks to stay inside, for pruning in rounds; densities still refer to all weights, and where the masks hold fewer
        than the budget allows, fewer are kept. Not with rule="paper".
    Raises ValueError for bad arguments, scores that are not floating-point, empty or not finite (naming the layer), a
    budget that the minima exceed and a layer that `within` leaves with less than its minimum. Warns about layers kept
    below 0.1 %.
    """
    pattern = get_pattern(pattern)
    min_density, min_per_layer = plain_number(min_density), plain_number(min_per_layer)
    choice = Choice(sparsity_under(pattern, sparsity), pattern, scope, budget, min_density, min_per_layer, rule)
    choice.check()
    for name, values in scores.items():
        check_scores(name, values)
    masks = _make(choice, scores, costs, within, recipe or {}, skipped)
    _warn_if_thin(masks)
    return masks


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float | None = None,
    criterion: str | Callable[..., Mapping[str, Tensor]] = "grasp",
    *,
    pattern: str | Pattern = "unstructured",
    scope: str = "global",
    budget: str = "weights",
    speedup: float | None = None,
    plan: str = "auto",
    max_density: float | None = None,
    loss_fn: LossFn | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    iterations: int | None = None,
    example_input: Any = None,
    costs: Mapping[str, float] | None = None,
    min_density: float = 0.0,
    min_per_layer: int = 1,
    rule: str | None = None,
    seed: int | None = None,
    reduce: Reduce | None = None,
    **options: Any,
) -> MaskSet:
    """Scores `model` and chooses which weights to keep; the model itself is not changed (see `sparsify_`).

    Arguments as in `score` and `make_masks`; `options` go to `score`. In addition:
    speedup: for budget="time", in place of sparsity: how many times as fast as the dense one, in its faster memory format, a
        whole training step should be. A weight then costs the seconds that its layer was measured to take for it. Masks
        are made, a step is measured, and the budget corrected until the step is that fast within 10 %; ValueError with
        the most that can be reached when it cannot. Steps run on `example_input`, or on the first batch: give it as
        many samples as training will use. A criterion of many rounds is scored anew, in all of them, at every share that is looked at.
    plan, max_density: with speedup, those of the `sparsify_` that will follow: the network that is measured is made with them.
    iterations: rounds of scoring the network with the masks so far and keeping density^(k / iterations) after round k;
        a pruned weight stays pruned. Default: as published, 100 for synflow, 1 for the others.
    example_input, costs: for budget="flops" and "time", what one forward sees; the first batch of `batches` unless given.
    rule: "exact", or the authors' threshold with preset="paper".
    reduce: as in `score`; with speedup, which one process measures, there is nothing to share.
    The masks' recipe says how they were made; `skipped` lists the modules left dense and why.

    Raises:
        ValueError: bad arguments, a model that is compiled or pruned already, batches that are none or give scores that are
            not finite (naming the layer), a budget that the minima exceed, a speedup that cannot be reached.
        RuntimeError: with speedup, no compiled kernels for the model's device: for now that is every one but the CPU.
    """
    check_uncompiled(model)
    published = get_criterion(criterion)
    if published.reads != 0:
        check_forwards(model)  # here, before the batches are read
    rounds = published.iterations if iterations is None else plain_number(iterations)
    seed, min_density, min_per_layer = map(plain_number, (seed, min_density, min_per_layer))
    if "within" in options:
        raise ValueError("Expected no within, got masks: prune goes by its own, round after round; give them to score and make_masks")
    if rounds < 1:
        raise ValueError(f"Expected at least one iteration, got {rounds}")
    usual_rule = "paper" if options.get("preset") == "paper" else "exact"
    pattern = get_pattern(pattern)
    _check_goal(pattern, budget, sparsity, speedup, costs)
    if speedup is None and (plan != "auto" or max_density is not None):
        raise ValueError("Expected plan and max_density with speedup only, got one without; give it to sparsify_")
    if speedup is not None and reduce is not None:
        raise ValueError("Expected no reduce with speedup, got one: measure in one process and hand its masks to the others")
    sparsity = sparsity_under(pattern, sparsity)
    choice = Choice(sparsity, pattern, scope, budget, min_density, min_per_layer, usual_rule if rule is None else rule)
    choice.check(rounds)
    selection = find_weights(model, include, exclude)
    wanted = {module_name for weight in selection.weights for module_name, _ in weight.modules}
    recipe = _recipe(criterion, rounds, seed, include=include, exclude=exclude, loss_fn=loss_fn, **options)
    drawing = {name: options.pop(name) for name in _BATCH_OPTIONS if name in options}
    if reduce is not None and published.sums and (budget == "weights" or costs is not None or example_input is not None):
        drawing["allow_none"] = True

    with preserved_rng(seed):
        measure = budget != "weights" and costs is None
        batches, example = _stored(batches, example_input, published.reads, budget if measure else None, drawing)
        if measure and budget == "flops":
            costs = weight_costs(model, example.inputs, include=include, exclude=exclude)

        def score_once(within: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            return score(
                model, batches, criterion, loss_fn, include=lambda name, _: name in wanted, reduce=reduce, within=within, **options
            )

        maker = _Maker(rounds, choice, score_once, recipe, selection.skipped)
        if speedup is None:
            masks = maker.masks_at(sparsity, costs)
        else:
            shapes = {weight.name: weight.parameter.shape for weight in selection.weights}
            sparsest = functools.partial(choice.sparsest, shapes)
            with torch.inference_mode(False), torch.enable_grad():  # steps are timed, whatever the caller computes
                masks = time_search(
                    model, maker.masks_at, sparsest, list(shapes), example, float(speedup), loss_fn, pattern, plan, max_density
                )
    _warn_if_thin(masks)
    return masks


def _stored(
    batches: Iterable[Any] | None, example_input: Any, reads: int | None, measured: str | None, drawing: Mapping[str, Any]
) -> tuple[Iterable[Batch] | None, Batch]:
    """The batches, to be read as often as the criterion does, and what the `measured` budget, if any, is measured on: the first
    of them unless there is an example."""
    from_batches = measured is not None and example_input is None
    if from_batches and batches is None:
        raise ValueError(f"Expected costs, example_input or batches with budget={measured!r}, got none of them")
    if batches is not None:
        reads = 1 if from_batches and reads == 0 else reads
        batches = store_batches(batches, reads=reads, **drawing) if reads != 0 else None
    return batches, next(iter(batches)) if from_batches else Batch(example_input, None)


@dataclass
class _Maker:
    """Masks at any sparsity."""

    rounds: int
    choice: Choice
    score_once: Callable[[Mapping[str, Tensor] | None], Mapping[str, Tensor]]  # of the network with only these weights left
    recipe: Mapping[str, Any]
    skipped: Iterable[tuple[str, str]]
    # Scores of the last round and the masks they were taken within, by sparsity, or None if there is but one round. Of the
    # sparsity asked for last alone: a search asks for many, and each is as large as the network.
    scored: dict[float | None, tuple[Mapping[str, Tensor], dict[str, Tensor] | None]] = field(default_factory=dict)

    def masks_at(self, share: float, prices: Mapping[str, float] | None) -> MaskSet:
        goal = replace(self.choice, sparsity=share)
        key = None if self.rounds == 1 else share  # in one round the scores do not depend on how much goes
        if key not in self.scored:
            self.scored = {key: self._score(goal, prices)}
        scores, within = self.scored[key]
        return _make(goal, scores, prices, within, self.recipe, self.skipped)

    def _score(self, goal: Choice, prices: Mapping[str, float] | None) -> tuple[Mapping[str, Tensor], dict[str, Tensor] | None]:
        """Scores the network again and again, after each round pruned a step further towards the goal."""
        within: dict[str, Tensor] | None = None
        for finished in range(1, self.rounds):
            step = replace(goal, sparsity=1 - (1 - goal.sparsity) ** (finished / self.rounds))
            within = step.masks(self.score_once(within), prices, within)
        return self.score_once(within), within


def _check_goal(
    pattern: Pattern, budget: str, sparsity: float | None, speedup: float | None, costs: Mapping[str, float] | None
) -> None:
    """ValueError unless exactly one thing is asked for."""
    if speedup is not None and budget != "time":
        raise ValueError(f"Expected budget='time' with speedup, got {budget!r}")
    if budget != "time":
        return
    if (sparsity is None) == (speedup is None):
        got = "neither" if sparsity is None else "both"
        raise ValueError(f"Expected either speedup or sparsity (with costs) with budget='time', got {got}")
    if (costs is None) == (speedup is None):
        raise ValueError("Expected costs, in seconds per weight, with sparsity and budget='time', and none with speedup")
    if speedup is not None and not 1 < speedup < math.inf:
        raise ValueError(f"Expected a speedup above 1, got {speedup}")
    if speedup is not None and pattern.density is not None:
        fixed = f"{pattern.name}, which fixes {pattern.density:g}"
        raise ValueError(f"Expected a pattern whose density is open with speedup, got {fixed}")


def _make(
    choice: Choice,
    scores: Mapping[str, Tensor],
    costs: Mapping[str, float] | None,
    within: Mapping[str, Tensor] | None,
    recipe: Mapping[str, Any],
    skipped: Iterable[tuple[str, str]],
) -> MaskSet:
    return MaskSet(choice.masks(scores, costs, within), {**choice.recipe(), **recipe}, skipped)


def _warn_if_thin(masks: MaskSet) -> None:
    thin = [f"{name} ({density:.3%})" for name, density in masks.layer_densities().items() if density < _NEARLY_EMPTY]
    if thin:
        warnings.warn(
            f"Layers kept below {_NEARLY_EMPTY:.1%}: {', '.join(thin)}. "
            "A network this thin may not train: raise min_density.",
            stacklevel=3,  # the caller of make_masks or prune
        )


def _recipe(criterion: Any, rounds: int, seed: int | None, **options: Any) -> dict[str, Any]:
    """What `prune` was asked for, in terms json can hold; objects by their name."""

    def plain(value: Any) -> Any:
        value = plain_number(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, torch.dtype) else getattr(value, "__name__", type(value).__name__)

    given = {name: plain(value) for name, value in options.items() if value is not None}
    return {"criterion": plain(criterion), "iterations": rounds, "seed": seed, **given}
