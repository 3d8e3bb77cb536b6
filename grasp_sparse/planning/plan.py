"""How each masked layer runs: the faster of sparse kernels and the dense kernel on a masked weight, by measuring both."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse import _extension
from grasp_sparse.ops import triton
from grasp_sparse.planning import cache, measure
from grasp_sparse.planning.inputs import LayerInput, layer_inputs
from grasp_sparse.planning.measure import Times
from grasp_sparse.targets import Target, find_targets

# Without measuring: above this share of kept weights a layer runs masked. At 0.3 the sparse kernels were 1.05 to 1.8 times as
# fast as the dense layer that would run in their place, at 0.4 between 0.75 and 1.3 times
# (benchmarks/results/layers-crossover.csv). That dense linear is nn.Linear; where MKL is as fast as oneDNN, 0.2 is better.
MAX_DENSITY = 0.3

# Sparse has to win by more than two measurements of the same thing differ.
_MARGIN = 1.03


@dataclass(frozen=True)
class PlanRow:
    """One weight: what it keeps, what its layers cost in each way, and how they will run."""

    weight: str  # its first name in the masks
    layers: tuple[str, ...]  # names of the modules that hold it
    shape: tuple[int, ...]
    inputs: tuple[LayerInput, ...]  # of all its layers; empty without example_input, or if none was called
    kept: int
    times: Times | None  # summed over layers and calls; None where nothing was measured
    runs: str  # "sparse", "masked" or "dense"
    reason: str
    block_size: tuple[int, int] | None = None  # of the blocks that a sparse layer stores whole

    @property
    def way(self) -> str:
        """How it runs, in words."""
        return describe_way(self.runs, self.block_size)

    @property
    def density(self) -> float:
        """Kept weights as a share of all."""
        return self.kept / max(1, torch.Size(self.shape).numel())


class Plan(Mapping[str, str]):
    """Parameter name -> "sparse", "masked" or "dense" (nothing pruned); ``str()`` is a table, ``rows`` its content."""

    def __init__(self, rows: Sequence[PlanRow], runs: Mapping[str, str]) -> None:
        self.rows = tuple(rows)
        self._runs = dict(runs)

    def __getitem__(self, name: str) -> str:
        return self._runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __str__(self) -> str:
        lines = [("layer", "weight", "input", "kept", "density", "dense ms", "masked ms", "sparse ms", "sparse/dense", "runs", "")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            seen = ", ".join(f"{'x'.join(map(str, given.shape))} {given.layout}" for given in row.inputs) or "-"
            times = ("-",) * 4
            if row.times:
                times = (*(f"{seconds * 1e3:.3f}" for seconds in row.times), f"{row.times.sparse / row.times.dense:.2f}")
            name = ", ".join(row.layers) or "(the model)"
            lines.append((name, shape, seen, f"{row.kept:,}", f"{row.density:.2%}", *times, row.way, row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def plan(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> Plan:
    """Measures every masked layer of ``model`` sparse and masked, on inputs like its own, and says how each should run.

    The model is not changed; ``sparsify_(model, masks, plan=...)`` carries the plan out. Times are of forward and backward
    in float32 or whatever the weights are, at the present number of threads, under autocast where it is on. On a machine that is
    busy with other things times are what they are. Masked layers are measured as an optimizer with ``raw_gradients`` trains them,
    at the cost of dense ones; another one has them mask their gradients, which takes some microseconds and a pass over each.

    Args:
        masks: as for ``sparsify_``.
        example_input: one input of ``model``, or a tuple or dict of them, with as many samples as training will use: the
            layers are measured on what this one gives them. A batch of one or two is measured as it is.

    Raises:
        ValueError: masks that do not fit; see ``sparsify_``.
    """
    targets = find_targets(model, masks)
    return measured_plan(targets, layer_inputs(model, example_input))


def measured_plan(targets: Sequence[Target], inputs: Mapping[str, Counter[LayerInput]]) -> Plan:
    """The plan by measuring; by density, which the reason says, where nothing can be measured."""
    rows = []
    for target in targets:
        times, runs, reason = None, target.runs, target.reason
        called = calls_of(target, inputs)
        if runs is None and (lack := _no_block_kernels(target)):
            runs, reason = "masked", lack
        elif runs is None and not called:
            # Whoever holds a layer and never calls it may read its weight, which a sparse one does not have.
            runs, reason = "masked", "not called on the example"
        elif runs is None and (obstacle := _no_kernels(target)):
            runs, reason = by_density(target, MAX_DENSITY)
            reason = "; ".join(filter(None, (reason, f"not measured: {obstacle}")))
        elif runs is None:
            times = target_times(target, called)
            runs = "sparse" if times.sparse * _MARGIN < times.masked else "masked"
            reason = "" if runs == "sparse" else f"sparse takes {times.sparse / times.masked:.2f} of the masked time"
        rows.append(_row(target, inputs, times, runs, reason))
    cache.save()
    return _as_plan(targets, rows)


def density_plan(targets: Sequence[Target], inputs: Mapping[str, Counter[LayerInput]], max_density: float) -> Plan:
    """The plan by a limit on density, nothing measured."""
    rows = []
    for target in targets:
        if target.runs:
            runs, reason = target.runs, target.reason
        elif lack := _no_block_kernels(target):
            runs, reason = "masked", lack
        else:
            runs, reason = by_density(target, max_density)
        rows.append(_row(target, inputs, None, runs, reason))
    return _as_plan(targets, rows)


def given_plan(targets: Sequence[Target], inputs: Mapping[str, Counter[LayerInput]], wanted: Mapping[str, str]) -> Plan:
    """The plan that ``wanted`` (parameter name -> how it runs) asks for.

    Raises:
        ValueError: a weight it does not decide, or decides in a way that is not possible.
    """
    measured = {row.weight: row for row in getattr(wanted, "rows", ())}
    rows = []
    for target in targets:
        answers = {wanted[name] for name in target.names if name in wanted}
        possible = (target.runs,) if target.runs else ("sparse", "masked")
        if len(answers) != 1 or not answers <= set(possible):
            got = " and ".join(map(repr, sorted(map(str, answers)))) or "none"
            why = f" ({target.reason})" if target.reason else ""
            raise ValueError(f"{target.names[0]}: Expected a plan that says {' or '.join(map(repr, possible))}{why}, got {got}.")
        known = measured.get(target.names[0])
        reason = target.reason or (known.reason if known else "as the plan says")
        rows.append(_row(target, inputs, known.times if known else None, answers.pop(), reason))
    return _as_plan(targets, rows)


def calls_of(target: Target, inputs: Mapping[str, Counter[LayerInput]]) -> list[tuple[nn.Module, LayerInput, int]]:
    """(layer, kind of input, number of calls) of all layers that hold the weight."""
    return [(layer, given, calls) for name, layer in target.layers.items() for given, calls in inputs.get(name, {}).items()]


def target_times(target: Target, called: Sequence[tuple[nn.Module, LayerInput, int]]) -> Times:
    """Times of one weight under its mask, summed over its layers, inputs and calls; measured, or remembered if they were."""
    parts = []
    for layer, given, calls in called:
        if not torch.is_autocast_enabled(layer.weight.device.type):
            given = given._replace(dtype=layer.weight.dtype)  # the model has run as a float32 copy if it is half precision
        key = cache.layer_key(layer, given, target.pattern.name)
        times = cache.recall(key, target.kept)
        if times is None:
            times = measure.measure_layer(layer, target.mask, given, target.block_size)
            cache.remember(key, target.kept, times)
        parts.append(times * calls)
    return functools.reduce(operator.add, parts)


def describe_way(runs: str, block_size: tuple[int, int] | None) -> str:
    """ "sparse", "masked", "dense", or "sparse, 32x32 blocks"."""
    return f"{runs}, {block_size[0]}x{block_size[1]} blocks" if runs == "sparse" and block_size else runs


def by_density(target: Target, max_density: float) -> tuple[str, str]:
    """("sparse" or "masked", why) by the share of kept weights alone."""
    if target.kept > max_density * target.mask.numel():
        return "masked", f"density above {max_density:g}"
    return "sparse", ""


def _no_kernels(target: Target) -> str | None:
    """Why measuring would say nothing: the sparse operations run on their pure-torch reference."""
    device = target.mask.device.type
    status = _extension.status()
    if device == "cuda":
        return status.cuda_reason if target.block_size is None else None
    return None if device == "cpu" and status.loaded else f"no compiled kernels for {device}"


def _no_block_kernels(target: Target) -> str | None:
    """Why these blocks must not run sparse on CUDA, dense or not: the reference would make a dense weight of them in every call."""
    if target.block_size is None or target.mask.device.type != "cuda":
        return None
    return triton.why_not(target.block_size)


def _row(target: Target, inputs: Mapping[str, Counter[LayerInput]], times: Times | None, runs: str, reason: str) -> PlanRow:
    seen = tuple(given for name in target.layers for given in inputs.get(name, ()))
    shape = tuple(target.mask.shape)
    return PlanRow(target.names[0], tuple(target.layers), shape, seen, target.kept, times, runs, reason, target.block_size)


def _as_plan(targets: Sequence[Target], rows: Sequence[PlanRow]) -> Plan:
    return Plan(rows, {name: row.runs for target, row in zip(targets, rows, strict=True) for name in target.names})
