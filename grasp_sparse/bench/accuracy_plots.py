"""The plot of benchmarks.accuracy: accuracy against what was removed, and against the measured time of a step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from grasp_sparse.report.style import DENSE, SERIES

_TITLES = {
    "criteria": "criteria at equal numbers of weights",
    "budgets": "what to limit: weights, multiply-adds or time",
    "cifar10": "the paper's networks at 98 % of the weights",
}


@dataclass(frozen=True)
class _Point:
    """Mean over the seeds of one method and target; `spread` is the standard deviation of the accuracy, in per cent as it is."""

    removed: float
    speed: float
    accuracy: float
    spread: float


def plot_accuracy(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel a study, data set and network. Criteria are drawn over the share removed, the rest over the speed of a step."""
    panels: dict[tuple[str, str, str], dict[str, list[_Point]]] = {}
    groups: dict[tuple[str, str, str, str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["study"], row["data"], row["model"], row["method"], row["target"]), []).append(row)
    for (study, data, model, method, _), runs in groups.items():
        panels.setdefault((study, data, model), {}).setdefault(method, []).append(_point(runs))
    names = dict.fromkeys(method for methods in panels.values() for method in methods if method != "dense")
    colours = dict(zip(names, SERIES * len(names), strict=False))  # a method's is the same in every panel
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.9 * lines), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((study, data, model), methods) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, methods, colours, over_sparsity=study == "criteria")
        axes.set(title=f"{_TITLES.get(study, study)}\n{model}, {data}", ylabel="test accuracy, %")
    figure.savefig(path)
    plt.close(figure)


def _point(runs: Sequence[Mapping[str, str]]) -> _Point:
    accuracies = [100 * float(run["accuracy"]) for run in runs]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    removed, speed = (statistics.fmean(float(run[name]) for run in runs) for name in ("weight_sparsity", "vs best dense"))
    return _Point(removed, speed, statistics.fmean(accuracies), spread)


def _panel(axes: Axes, methods: Mapping[str, Sequence[_Point]], colours: Mapping[str, str], over_sparsity: bool) -> None:
    best = max(point.accuracy for points in methods.values() for point in points)
    # A method that learned nothing would press all others into one line: it is named, below the panel's end.
    lost = {name for name, points in methods.items() if max(point.accuracy for point in points) < best / 2}
    shown = [point.accuracy for name, points in methods.items() if name not in lost for point in points]
    margin = 0.08 * (max(shown) - min(shown)) + 0.5
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    for method, points in methods.items():
        if method == "dense":
            axes.axhline(points[0].accuracy, color=DENSE, lw=1.2, ls="--", label="dense")
            axes.axhspan(points[0].accuracy - points[0].spread, points[0].accuracy + points[0].spread, color=DENSE, alpha=0.2, lw=0)
            continue
        points = sorted(points, key=lambda point: point.removed if over_sparsity else point.speed)
        places = [1 / (1 - point.removed) if over_sparsity else point.speed for point in points]
        axes.errorbar(
            places, [point.accuracy for point in points], [point.spread for point in points],
            color=colours[method], marker="o", ms=4.5, capsize=3, elinewidth=1,
            label=f"{method} (at most {max(point.accuracy for point in points):.0f} %, below)" if method in lost else method,
        )
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if over_sparsity:
        ticks = sorted({1 / (1 - point.removed) for name, points in methods.items() if name != "dense" for point in points})
        axes.set_xticks(ticks, [f"{1 - 1 / tick:.3g}".replace("0.", ".") for tick in ticks])
        axes.set(xlabel="share of the weights removed")
    else:
        axes.set_xticks([1, 1.5, 2, 3, 4, 6, 8])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:g}×"))
        speeds = [point.speed for name, points in methods.items() if name != "dense" for point in points]
        axes.set(xlabel="speed of a step against dense (measured)", xlim=(min(speeds) / 1.1, max(speeds) * 1.1))
    axes.legend(fontsize=8.5, loc="lower left")
