"""How each masked layer runs: the fastest of sparse kernels and the dense kernel on a masked weight, by measuring all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.planning import cache
from grasp_sparse.planning.inputs import LayerInput, LayerInputs, layer_inputs
from grasp_sparse.planning.layer_times import MARGIN, calls_of, describe_blocks, fastest_times, measurable, measure_all, obstacle
from grasp_sparse.planning.measure import Times
from grasp_sparse.targets import BlockSize, Target, find_targets

# Without measuring: above this share of kept weights a layer runs masked. At 0.3 the sparse kernels were 1.05 to 1.8 times as
# fast as the dense layer that would run in their place, at 0.4 between 0.75 and 1.3 times
# (benchmarks/results/layers-crossover.csv). That dense linear is nn.Linear; where MKL is as fast as oneDNN, 0.2 is better.
MAX_DENSITY = 0.3

# So small a share of the time of all measured layers no step would show, and calls so short take a good deal longer in one minute than
# in another (where the cores of a machine come to lie on one die, or on two). There sparse has to win clearly.
_SHOWS, _CLEARLY = 1e-3, 1.5


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
    block_size: BlockSize = None  # of the blocks that a sparse layer stores whole

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

    Under a block pattern it is measured sparse both with whole blocks and with single weights stored.

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
    inputs = layer_inputs(model, example_input)
    return measured_plan(decided_by_example(targets, inputs), inputs)


def decided_by_example(targets: Iterable[Target], inputs: LayerInputs) -> list[Target]:
    """The targets, without a choice where the example that gave ``inputs`` showed that others than its layers may need the weight."""
    return [_decided(target, inputs) if target.runs is None else target for target in targets]


def _decided(target: Target, inputs: LayerInputs) -> Target:
    if not calls_of(target, inputs):
        # Whoever holds a layer and never calls it may read its weight, which a sparse one does not have.
        return target._replace(runs="masked", reason="not called on the example")
    if not inputs.read.isdisjoint(target.layers):
        return target._replace(runs="masked", reason="its weight is read outside the layer")
    return target


def measured_plan(targets: Sequence[Target], inputs: Mapping[str, Counter[LayerInput]]) -> Plan:
    """The plan by measuring; by density, which the reason says, where nothing can be measured.

    Targets that have a choice were called; see ``decided_by_example``.
    """
    measure_all((target, calls_of(target, inputs)) for target in targets if target.runs is None)
    found = {
        target.names[0]: fastest_times(target, calls_of(target, inputs))
        for target in targets
        if target.runs is None and measurable(target)
    }
    unsure = _unsure({name: times for name, (times, *_) in found.items()})
    rows = []
    for target in targets:
        times, runs, reason, stored = None, target.runs, target.reason, target.block_size
        if runs is None and not _runnable(target):
            runs, reason = "masked", obstacle(target, stored)
        elif runs is None and not measurable(target):
            runs, reason = by_density(target, MAX_DENSITY)
            reason = "; ".join(filter(None, (reason, f"not measured: {obstacle(target, stored)}")))
        elif runs is None:
            times, stored, reason = found[target.names[0]]
            share = f"sparse takes {times.sparse / times.masked:.2f} of the masked time"
            if times.sparse * MARGIN >= times.masked:
                runs, reason = "masked", share
            elif target.names[0] in unsure:
                runs, reason = "masked", f"{share}, too little of the whole to be sure of"
            else:
                runs = "sparse"
        rows.append(_row(target, inputs, times, runs, reason, stored))
    cache.save()
    return _as_plan(targets, rows)


def _unsure(found: Mapping[str, Times]) -> set[str]:
    """Whose gain is neither clear nor, all of them together, anything a step would show."""
    room, names = _SHOWS * sum(min(times.masked, times.sparse) for times in found.values()), set()
    for name, times in sorted(found.items(), key=lambda item: item[1].masked - item[1].sparse):
        if times.sparse * MARGIN < times.masked <= times.sparse * _CLEARLY:
            room -= times.masked - times.sparse
            if room < 0:
                break
            names.add(name)
    return names


def density_plan(targets: Sequence[Target], inputs: Mapping[str, Counter[LayerInput]], max_density: float) -> Plan:
    """The plan by a limit on density, nothing measured."""
    rows = []
    for target in targets:
        stored = next(iter(_runnable(target)), target.block_size)
        if target.runs:
            runs, reason = target.runs, target.reason
        elif not _runnable(target):
            runs, reason = "masked", obstacle(target, stored)
        else:
            runs, reason = by_density(target, max_density)
            if stored != target.block_size:
                reason = "; ".join(filter(None, (reason, obstacle(target, target.block_size))))
        rows.append(_row(target, inputs, None, runs, reason, stored))
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
        stored = known.block_size if known and known.block_size in target.storages else target.block_size
        rows.append(_row(target, inputs, known.times if known else None, answers.pop(), reason, stored))
    return _as_plan(targets, rows)


def describe_way(runs: str, block_size: BlockSize) -> str:
    """ "sparse", "masked", "dense", or "sparse, 32x32 blocks"."""
    return f"{runs}, {describe_blocks(block_size)}" if runs == "sparse" and block_size else runs


def by_density(target: Target, max_density: float) -> tuple[str, str]:
    """("sparse" or "masked", why) by the share of kept weights alone."""
    if target.kept > max_density * target.mask.numel():
        return "masked", f"density above {max_density:g}"
    return "sparse", ""


def _runnable(target: Target) -> list[BlockSize]:
    """What may be stored. Of blocks on CUDA the reference would make a dense weight in every call, so there only what has kernels."""
    on_reference = target.block_size is None or target.mask.device.type != "cuda"
    return list(target.storages) if on_reference else measurable(target)


def _row(
    target: Target, inputs: Mapping[str, Counter[LayerInput]], times: Times | None, runs: str, reason: str, stored: BlockSize
) -> PlanRow:
    seen = tuple(given for name in target.layers for given in inputs.get(name, ()))
    shape = tuple(target.mask.shape)
    return PlanRow(target.names[0], tuple(target.layers), shape, seen, target.kept, times, runs, reason, stored)


def _as_plan(targets: Sequence[Target], rows: Sequence[PlanRow]) -> Plan:
    return Plan(rows, {name: row.runs for target, row in zip(targets, rows, strict=True) for name in target.names})
