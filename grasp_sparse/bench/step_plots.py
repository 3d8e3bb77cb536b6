"""Plots of whole training steps: how much faster, and where their time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import pyplot as plt

from grasp_sparse.bench.breakdown import CATEGORIES
from grasp_sparse.bench.results import DENSE, SPARSE, kind_of
from grasp_sparse.report.style import ACCENT, INK, save_plot
from grasp_sparse.report.style import DENSE as GREY
from grasp_sparse.report.style import SPARSE as PETROL

Rows = Sequence[Mapping[str, str]]
_COLOURS = {
    "conv and linear": PETROL, "norm": "#5eaaa3", "activation": "#a7d3cf", "pooling": "#d6b48a", "optimizer": ACCENT,
    "other": GREY,
}  # fmt: skip


def plot_steps(rows: Rows, path: Path) -> None:
    """Bars: how many times as fast the faster sparse step is as the fastest dense one, by model, budget and sparsity.

    Rows of single layers, which `grasp-sparse bench` writes too, are left out.
    """
    rows = [row for row in rows if row["pass"] == "training step"]
    cases = list(dict.fromkeys((row["model"], row["budget"], row["sparsity"]) for row in rows))
    models = list(dict.fromkeys(model for model, _, _ in cases))
    figure, grid = plt.subplots(
        1, len(models), figsize=(max(5.0, 3.1 * len(models) + 0.6), 3.7), layout="constrained", sharey=True, squeeze=False
    )
    for axes, model in zip(grid.flat, models):
        labels, speeds, colours = [], [], []
        for name, budget, share in cases:
            own = [row for row in rows if (row["model"], row["budget"], row["sparsity"]) == (name, budget, share)]
            if name == model:
                times = {kind: min(float(row["median_s"]) for row in own if kind_of(row["arm"]) == kind) for kind in (DENSE, SPARSE)}
                labels.append(f"{float(share):.0%}")
                speeds.append(times[DENSE] / times[SPARSE])
                colours.append(PETROL if budget == "flops" else GREY)
        axes.bar(range(len(labels)), speeds, color=colours, width=0.7)
        for x, speed in enumerate(speeds):
            axes.text(x, speed, f"{speed:.1f}x", ha="center", va="bottom", fontsize=8.5, fontweight="bold")
        axes.axhline(1, color=INK, lw=1.1, ls=(0, (4, 3)))
        axes.set_xticks(range(len(labels)), labels)
        axes.set(title=model, xlabel="removed")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
    grid[0, 0].set_ylabel("times as fast as dense")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (PETROL, GREY)]
    figure.legend(handles, ["of the multiply-adds", "of the weights"], loc="outside lower center", ncols=2)
    figure.suptitle("A whole training step, against the fastest dense one", x=0.01, ha="left", fontweight="bold", fontsize=12)
    save_plot(figure, path)


def plot_breakdown(rows: Rows, path: Path) -> None:
    """Stacked bars, a panel a model: where the time of the fastest dense and of the fastest sparse step goes."""
    rows = [row for row in rows if kind_of(row["arm"]) in (DENSE, SPARSE)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    bars = {model: _bars([row for row in rows if row["model"] == model]) for model in models}
    columns = 1 if len(models) <= 2 else 2
    lines = math.ceil(len(models) / columns)
    tallest = max(map(len, bars.values()))
    figure, grid = plt.subplots(
        lines, columns, figsize=(7.2 * columns, 1.1 + lines * (0.31 * tallest + 0.9)), layout="constrained", squeeze=False
    )
    for axes, (model, found) in zip(grid.flat, bars.items()):
        labels = list(found)
        start = [0.0] * len(labels)
        for category in CATEGORIES:
            width = [found[label].get(category, 0.0) * 1e3 for label in labels]
            axes.barh(labels, width, left=start, color=_COLOURS[category], height=0.72, edgecolor="white", linewidth=0.6)
            start = [a + b for a, b in zip(start, width)]
        for row, total in enumerate(start):
            axes.text(total, row, f"  {total:.4g} ms", va="center", fontsize=8.5, fontweight="bold" if row else None)
        axes.set(title=model, xlim=(0, max(start) * 1.14))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    for axes in list(grid.flat)[len(models):]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("milliseconds a training step, under the profiler")
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[category]) for category in CATEGORIES]
    figure.legend(handles, CATEGORIES, loc="outside upper center", ncols=len(CATEGORIES), fontsize=8.5, columnspacing=1.2, handlelength=1.2)
    save_plot(figure, path)


def _bars(rows: Rows) -> dict[str, dict[str, float]]:
    """Label -> category -> seconds: the dense step, mean over the cases, then the sparse step of each."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        what = "multiply-adds" if row["budget"] == "flops" else row["budget"]
        label = DENSE if kind_of(row["arm"]) == DENSE else f"{float(row['sparsity']):.0%} of {what}"
        found.setdefault(label, {}).setdefault(row["category"], []).append(float(row["seconds"]))
    return {label: {category: fmean(spent) for category, spent in parts.items()} for label, parts in found.items()}
