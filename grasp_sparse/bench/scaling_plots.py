"""The plot of benchmarks.scaling: time against kept weights, with the fitted line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from grasp_sparse.report.style import ACCENT, INK, SPARSE


def plot_fits(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A column a shape: medians with quartiles and the line; below, how far each median is from it."""
    shapes: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if row["measured"] == "weights":
            shapes.setdefault(row["shape"], []).append(row)
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(4.6 * len(shapes), 4.6), layout="constrained", squeeze=False, sharex="col", height_ratios=(3, 1)
    )
    for (shape, measured), (above, below) in zip(shapes.items(), axes.T, strict=True):
        nnz = numpy.array([float(row["nnz"]) for row in measured])
        median, q1, q3, fitted = (
            numpy.array([float(row[name]) for row in measured]) * 1e3 for name in ("median_s", "q1_s", "q3_s", "fit_s")
        )
        a, b, r2 = (float(measured[0][name]) for name in ("fit_a_s", "fit_b_s", "fit_r2"))
        ends = numpy.array([0, nnz.max() * 1.05])
        above.plot(ends, (a + b * ends) * 1e3, color=ACCENT, label=f"{a * 1e3:.3g} ms + {b * 1e9:.3g} ns per weight, R² {r2:.4f}")
        above.errorbar(nnz, median, (median - q1, q3 - median), fmt="o", ms=5, color=SPARSE, ecolor=INK, elinewidth=1, capsize=3)
        above.set(title=shape, xlim=ends, ylim=(0, q3.max() * 1.25), ylabel="milliseconds (median, quartiles)")
        above.legend(loc="upper left", fontsize=8.5)
        below.axhline(0, color=ACCENT, lw=1)
        below.plot(nnz, (median / fitted - 1) * 100, "o", ms=5, color=SPARSE)
        below.set(xlabel="kept weights", ylabel="off the line, %")
        below.xaxis.set_major_locator(MaxNLocator(5))
    figure.savefig(path)
    plt.close(figure)
