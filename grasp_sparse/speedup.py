"""Masks that make the whole training step faster by a given factor: ``gs.prune(..., budget="time", speedup=4.0)``.

A step takes a·Σ cost(layer, kept) + b: costs from ``planning.cost_model``, b all that is no prunable layer, at first the dense
step less its layers. The share of the layers' seconds to remove is solved for, the masks are made, a step of the sparse
network is measured beside the dense one, and a and b are corrected by what was found, until the step is as fast as asked.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse import _extension, optim, pruning
from grasp_sparse.criteria.batches import Batch
from grasp_sparse.criteria.loss import LossFn, batch_loss
from grasp_sparse.masks import MaskSet
from grasp_sparse.nested import first_tensor, map_tensors
from grasp_sparse.patterns import GroupPattern, Unstructured
from grasp_sparse.planning.cost_model import layer_costs
from grasp_sparse.scratch import call_model
from grasp_sparse.surgery import sparsify_
from grasp_sparse.timing import interleaved

TOLERANCE = 0.10
_GOOD_ENOUGH = 0.04  # tries end here; after the last one anything within TOLERANCE will do
_MAX_TRIES = 6
_ROUNDS = 40
_USUAL_ROUNDS = 9
_LEAST_REST = 0.1  # of a dense step: layers alone may take longer than in it, and nothing would be left for the rest
_LONG_ENOUGH = 4.0  # seconds of steps after which, from _USUAL_ROUNDS on, measuring ends
_TOO_LONG = 20.0  # … at any rate
_SOLVED = 0.005
_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SPARSE = "sparse"


class UnreachableSpeedupError(ValueError):
    """No masks make the step as fast as asked; ``most``, rounded down, is how fast it gets."""

    def __init__(self, message: str, most: float) -> None:
        super().__init__(message)
        self.most = most


class Try(NamedTuple):
    """One network that was built and measured."""

    share: float  # of the layers' seconds that was removed
    kept_seconds: float  # Σ cost of its layers by the model of costs
    dense: float  # seconds of a dense step, in the faster memory format
    sparse: float  # of a step of the network
    masks: MaskSet

    @property
    def speedup(self) -> float:
        return self.dense / self.sparse


def fit_speedup(
    model: nn.Module,
    masks_at: Callable[[float, Mapping[str, float]], MaskSet],
    sparsest: Callable[[Mapping[str, float]], float],
    names: Sequence[str],
    batch: Batch,
    speedup: float,
    loss_fn: LossFn | None = None,
    pattern: GroupPattern = Unstructured(),
    plan: str = "auto",
    max_density: float | None = None,
) -> MaskSet:
    """Masks under which a training step of ``model`` is ``speedup`` times as fast as the dense one, within 10 %.

    A step is forward, loss, backward and SGD with momentum, in one pass over each tensor; the dense one runs in the faster of its
    memory formats, the sparse one as ``model`` is. The model is not changed.

    Args:
        masks_at: (share of the layers' seconds to remove, seconds per weight by name) -> masks.
        sparsest: seconds per weight -> the largest share that can be removed.
        names: of the weights that may be pruned.
        pattern: of the masks that ``masks_at`` makes.
        plan, max_density: of the caller's ``sparsify_``, which makes the networks measured here too.
        batch: what a step runs on; without targets the loss is the mean square of the output.

    Raises:
        UnreachableSpeedupError: no masks are that fast; says how fast the network gets with nearly nothing left.
        ValueError: nothing can be saved.
        RuntimeError: no compiled kernels for the model's device.
    """
    device = next(model.parameters()).device.type
    if device != "cpu" or not _extension.status().loaded:
        reason = _extension.status().reason if device == "cpu" else "steps are timed on the CPU only so far"
        raise RuntimeError(f"Expected compiled kernels for {device} with budget='time', found none: {reason}")
    costs = layer_costs(model, names, batch.inputs, pattern)
    prices = {name: cost.slope for name, cost in costs.items()}
    if not any(prices.values()):
        raise ValueError("Expected a layer that sparse kernels can run and example_input reaches, got none: nothing can be saved")
    dense = measure_steps(model, None, batch, loss_fn)
    reference = min(dense.values())
    step = dense[own_format(model, dense)]
    rest = max(_LEAST_REST * step, step - sum(cost.dense for cost in costs.values()))

    def kept_seconds(masks: Mapping[str, Tensor]) -> float:
        return sum(cost.seconds(int(masks[name].count_nonzero())) for name, cost in costs.items())

    priced: dict[float, float] = {}  # of every share that was looked at; their masks would be as large as the network, each

    def kept_at(share: float) -> float:
        if share not in priced:
            priced[share] = kept_seconds(masks_at(share, prices))
        return priced[share]

    def attempt(share: float) -> Try:
        masks = masks_at(share, prices)
        network = copy.deepcopy(model)
        # a plan that is measured is the one that the caller's sparsify_ will find in the cache of times
        sparsify_(network, masks, batch.inputs, plan, max_density)
        times = measure_steps(model, network, batch, loss_fn)
        sparse = times.pop(SPARSE)
        return Try(share, kept_seconds(masks), min(times.values()), sparse, masks)

    most = sparsest(prices)
    tries: list[Try] = []
    while len(tries) < _MAX_TRIES:
        reference = min([reference, *(one.dense for one in tries)])
        scale, offset = _fit(tries, reference, rest)
        wanted = (reference / speedup - offset) / scale
        share = _bracketed(_solve(kept_at, wanted, most), tries, speedup)
        last = attempt(share)
        tries.append(last)
        if abs(last.speedup / speedup - 1) <= _GOOD_ENOUGH:
            break
        if share == most and last.speedup < speedup:
            break
    return _chosen(tries, speedup, at_most=tries[-1].share == most)


def _chosen(tries: Sequence[Try], speedup: float, at_most: bool) -> MaskSet:
    """The masks of the try that came nearest, with what was measured in their recipe.

    ``at_most``: the last try removed all that can be removed. Raises UnreachableSpeedupError when even that was not
    fast enough.
    """
    best = min(tries, key=lambda one: abs(math.log(one.speedup / speedup)))
    if abs(best.speedup / speedup - 1) > TOLERANCE:
        fastest = max(tries, key=lambda one: one.speedup)
        if fastest.speedup < speedup and at_most:
            most = math.floor(10 * fastest.speedup) / 10
            raise UnreachableSpeedupError(
                f"Expected a speedup that can be reached, got {speedup:g}: with {fastest.masks.density:.3%} of the weights left "
                f"a step is {fastest.speedup:.2f} times as fast as the dense one. What is no prunable layer remains, and a fixed "
                f"part of every layer; ask for at most {most:g}.",
                most,
            )
        warnings.warn(
            f"Expected masks that are {speedup:g} times as fast within {TOLERANCE:.0%}, found {best.speedup:.2f} in "
            f"{len(tries)} tries; on a machine that is busy with other things steps take different times at every look.",
            stacklevel=4,  # the caller of prune
        )
    tried = [{"density": one.masks.density, "dense_s": one.dense, "sparse_s": one.sparse} for one in tries]
    recipe = {"speedup": speedup, "dense_step_s": best.dense, "sparse_step_s": best.sparse, "tries": tried}
    return MaskSet(best.masks, {**best.masks.recipe, **recipe}, best.masks.skipped)


def measure_steps(model: nn.Module, sparse: nn.Module | None, batch: Batch, loss_fn: LossFn | None) -> dict[str, float]:
    """Seconds of a training step: of copies of ``model`` by memory format, and of ``sparse`` ("sparse"), in turns.

    The fastest of the rounds: whatever else a shared machine does only ever adds. ``sparse`` is used up.
    """
    arms = {}
    if _has_formats(model, batch):
        for name, memory_format in _FORMATS.items():
            arms[name] = _step(copy.deepcopy(model).to(memory_format=memory_format), _to(batch, memory_format), loss_fn)
    else:
        arms["dense"] = _step(copy.deepcopy(model), batch, loss_fn)
    if sparse is not None:
        arms[SPARSE] = _step(sparse, batch, loss_fn)

    def enough(seconds: dict[str, list[float]]) -> bool:
        spent = sum(map(sum, seconds.values()))
        return spent > (_LONG_ENOUGH if min(map(len, seconds.values())) >= _USUAL_ROUNDS else _TOO_LONG)

    timings = interleaved(arms, _ROUNDS, warmup=2, enough=enough)
    return {name: timing.best for name, timing in timings.items()}


def own_format(model: nn.Module, dense: Mapping[str, float]) -> str:
    """Which of the formats of ``dense`` the weights of ``model`` are in."""
    if len(dense) == 1:
        return next(iter(dense))
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return "nchw" if all(weight.is_contiguous() for weight in weights) else "channels_last"


def _has_formats(model: nn.Module, batch: Batch) -> bool:
    return first_tensor(batch.inputs).dim() == 4 and any(isinstance(module, nn.Conv2d) for module in model.modules())


def _to(batch: Batch, memory_format: torch.memory_format) -> Batch:
    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=memory_format) if tensor.dim() == 4 else tensor

    return Batch(map_tensors(convert, batch.inputs), batch.targets)


def _step(model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> Callable[[], None]:
    """One training step of ``model`` on ``batch``, at rate zero: it costs the same and the weights stay what they are."""
    # Of one pass over each tensor, as in training: torch's usual ones would make dense steps seem slower than they need be.
    optimizer = optim.one_pass("SGD", model.train(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        if batch.targets is None:
            loss = first_tensor(call_model(model, batch.inputs)).float().square().mean()
        else:
            loss = batch_loss(model, batch, loss_fn, 1.0)
        loss.backward()
        optimizer.step()

    return run


def _fit(tries: Sequence[Try], reference: float, rest: float) -> tuple[float, float]:
    """(a, b) of step = a · kept_seconds + b, steps in units in which the dense one takes ``reference`` seconds.

    One measured step moves b; two that differ give the line through them, where that is believable.
    """
    if not tries:
        return 1.0, rest
    steps = [reference / one.speedup for one in tries[-2:]]
    kept = [one.kept_seconds for one in tries[-2:]]
    scale = 1.0
    if len(steps) == 2 and abs(kept[1] - kept[0]) > 0.01 * max(kept):
        slope = (steps[1] - steps[0]) / (kept[1] - kept[0])
        scale = slope if 0.25 < slope < 4 else 1.0
    return scale, steps[-1] - scale * kept[-1]


def _bracketed(share: float, tries: Sequence[Try], speedup: float) -> float:
    """``share`` if it lies between those found too slow and too fast, else their middle (in the logarithm of what is kept)."""
    slow = max((one.share for one in tries if one.speedup < speedup), default=None)
    fast = min((one.share for one in tries if one.speedup >= speedup), default=None)
    if slow is None or fast is None or slow < share < fast or slow >= fast:
        return share
    return 1 - math.sqrt((1 - slow) * (1 - fast))


def _solve(seconds: Callable[[float], float], wanted: float, most: float) -> float:
    """The share to remove, at most ``most``, at which ``seconds(share)`` is ``wanted``; falling in the share.

    Regula falsi on the share kept (Illinois' variant), for every look makes masks of the whole network.
    """
    low, high = 1 - most, 1.0
    at_low, at_high = seconds(most) - wanted, seconds(0.0) - wanted
    if at_low >= 0:
        return most
    if at_high <= 0:
        return 0.0
    kept, side = high, 0
    for _ in range(25):
        kept = (low * at_high - high * at_low) / (at_high - at_low)
        at = seconds(1 - kept) - wanted
        if abs(at) <= _SOLVED * wanted or high - low < 1e-9:
            break
        if at > 0:
            high, at_high = kept, at
            at_low *= 0.5 if side == 1 else 1.0
            side = 1
        else:
            low, at_low = kept, at
            at_high *= 0.5 if side == -1 else 1.0
            side = -1
    return 1 - kept


pruning.time_search = fit_speedup
