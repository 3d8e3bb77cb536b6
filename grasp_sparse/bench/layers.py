"""Each pruned layer of a network alone, on the input it has there, against the dense layer it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from grasp_sparse.bench.arms import check_arms, layer_arms, layout_of
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, timing_columns
from grasp_sparse.surgery_report import LayerReport, SurgeryReport
from grasp_sparse.timing import interleaved_within


def measurable(report: SurgeryReport) -> list[LayerReport]:
    """The rows of layers that surgery changed and that ran on the example input."""
    return [row for row in report.rows if row.runs != DENSE and row.input_shape is not None]


def measure_layer(
    row: LayerReport, dense: nn.Module, pruned: nn.Module, *, input_grad: bool, seconds: float, seed: int = 0
) -> list[Row]:
    """Forward and backward of `dense` and `pruned` on random numbers of the layer's input shape: a row an arm.

    `dense` holds the weight with zeros where pruned. Raises WrongResultError when their results differ.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(row.input_shape, generator=generator)
    with torch.no_grad():
        y = dense(x)
    arms = layer_arms(dense, {"": pruned}, x, torch.randn(y.shape, generator=generator), input_grad=input_grad)
    check_arms(arms, dense, pruned.mask)
    times = interleaved_within(arms, seconds, lead_in=3, fewest=3)  # of a call of 0.1 ms a second one still warms up Python
    return [
        {
            "layer": row.name, "kind": row.kind, "shape": "x".join(map(str, row.shape)), "input": "x".join(map(str, row.input_shape)),
            "runs": row.runs if kind_of(name) == SPARSE else DENSE, "nnz": row.kept, "density": f"{row.density:.5f}",
            "pass": "forward+backward", "input_grad": "yes" if input_grad else "no", "precision": "float32",
            "layout": layout_of(name), "arm": name,
            **timing_columns(times, name, [other for other in arms if kind_of(other) == kind_of(name)]),
        }
        for name in arms
    ]  # fmt: skip


def measure_layers(
    masked: nn.Module, sparse: nn.Module, report: SurgeryReport, *, seconds: float, progress: Callable[[Iterable], Iterable] = iter
) -> list[Row]:
    """Rows of every layer that `report` says was pruned; `masked` is the dense network, `sparse` the one after surgery.

    seconds: for each layer. progress: wraps the layers, e.g. a tqdm. The network's first layer needs no gradient of its input.
    """
    first = next((row.name for row in report.rows if row.input_shape is not None), None)
    rows: list[Row] = []
    for row in progress(measurable(report)):
        dense, pruned = masked.get_submodule(row.name), sparse.get_submodule(row.name)
        rows += measure_layer(row, dense, pruned, input_grad=row.name != first, seconds=seconds)
    return rows


def verdict(rows: list[Row], noise: float = 0.03) -> str:
    """How many layers are as fast as dense, and of each that is slower by more than `noise` its share of all layers' dense time."""
    best = {kind: {row["layer"]: row for row in rows if row["best"] and kind_of(row["arm"]) == kind} for kind in (DENSE, SPARSE)}
    dense = {name: float(row["median_s"]) for name, row in best[DENSE].items()}
    slower = {name: float(row["vs best dense"]) for name, row in best[SPARSE].items() if float(row["vs best dense"]) < 1 - noise}
    text = f"{len(dense) - len(slower)} of {len(dense)} layers as fast as dense or faster (within {noise:.0%})"
    shares = (f"{name} {ratio:.2f}x, {dense[name] / sum(dense.values()):.2%} of the time of all" for name, ratio in slower.items())
    return f"{text}; slower: {'; '.join(shares)}" if slower else text


def layer_table(rows: list[Row]) -> list[tuple[str, ...]]:
    """Columns layer, runs, density, dense ms, sparse ms, ratio: of each layer its fastest dense and its fastest pruned arm."""
    lines = []
    for name in dict.fromkeys(row["layer"] for row in rows):
        best = {kind_of(row["arm"]): row for row in rows if row["layer"] == name and row["best"]}
        dense, pruned = best[DENSE], best[SPARSE]
        milliseconds = [f"{float(row['median_s']) * 1e3:.3f}" for row in (dense, pruned)]
        ratio = f"{float(pruned['vs best dense']):.2f}x"
        lines.append((name, pruned["input"], pruned["runs"], f"{float(pruned['density']):.2%}", *milliseconds, ratio))
    return lines
