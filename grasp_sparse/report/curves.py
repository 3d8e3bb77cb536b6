"""Loss and accuracy over the epochs: training and test of one run, or the test curves of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grasp_sparse.report.style import ACCENT, DENSE, SERIES, SPARSE

Rows = Sequence[Mapping[str, Any]]
QUANTITIES = ("accuracy", "loss")
_SIZE = (4.7, 3.3)  # inches: on a telephone the lettering is then still of its natural size
_MOST_MARKED = 30  # epochs


def plot_curve(rows: Rows, quantity: str) -> plt.Figure:
    """Training and test `quantity` of one run; of the accuracy the best epoch is marked."""
    figure, axes = _axes(quantity)
    _line(axes, rows, f"train_{quantity}", label="training", color=DENSE)
    _line(axes, rows, f"test_{quantity}", label="test", color=SPARSE)
    if f"ema_{quantity}" in rows[0]:
        _line(axes, rows, f"ema_{quantity}", label="test, moving average", color="#5eaaa3", linestyle=(0, (4, 2)))
    if quantity == "accuracy":
        best = max(rows, key=lambda row: row["test_accuracy"])
        label = f"best {best['test_accuracy']:.2%}"
        axes.plot(best["epoch"], best["test_accuracy"], "o", ms=9, mfc="none", mec=ACCENT, mew=1.5, label=label)
    axes.legend()
    return figure


def plot_curves(runs: Mapping[str, Rows], quantity: str) -> plt.Figure:
    """The test `quantity` of each run, by label."""
    figure, axes = _axes(quantity)
    for number, (label, rows) in enumerate(runs.items()):
        style = ("-", (0, (4, 2)), (0, (1, 1.2)))[number // len(SERIES) % 3]
        _line(axes, rows, f"test_{quantity}", label=label, color=SERIES[number % len(SERIES)], linestyle=style)
    axes.set_title(f"Test {quantity}")
    figure.legend(loc="outside lower center", ncols=1 if max(map(len, runs)) > 24 else 2, fontsize=8.5)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.17 * len(runs))
    return figure


def _axes(quantity: str) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    axes.set(title=quantity.capitalize(), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure, axes


def _line(axes: Axes, rows: Rows, column: str, **style: Any) -> None:
    marker = "o" if len(rows) <= _MOST_MARKED else None
    axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], marker=marker, ms=3.5, **style)
