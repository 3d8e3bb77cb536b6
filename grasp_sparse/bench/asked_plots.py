"""Plot of speeds that were asked for against those that were got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from grasp_sparse.bench.arms import speed_got
from grasp_sparse.bench.results import SPARSE, kind_of
from grasp_sparse.report.style import INK, SERIES, save_plot
from grasp_sparse.speedup import TOLERANCE


def plot_asked(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Dots: the step of the network that was found, measured anew, against what was asked for, a colour a model."""
    best = [row for row in rows if row["best"] and kind_of(row["arm"]) == SPARSE]
    figure, axes = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
    asked = sorted({float(row["asked"]) for row in best})
    ends = (0.8 * asked[0], 1.25 * asked[-1]) if asked else (1, 10)
    axes.plot(ends, ends, color=INK, lw=1.1, ls=(0, (4, 3)))
    low, high = ([share * end for end in ends] for share in (1 - TOLERANCE, 1 + TOLERANCE))
    axes.fill_between(ends, low, high, color=INK, alpha=0.08, lw=0)
    for model, colour in zip(dict.fromkeys(row["model"] for row in best), SERIES):
        own = [row for row in best if row["model"] == model]
        axes.plot([float(row["asked"]) for row in own], [speed_got(row) for row in own], "o", ms=6, color=colour, label=model, alpha=0.85)
    axes.set(xscale="log", yscale="log", xlabel="asked for, times as fast as dense", ylabel="measured anew")
    axes.set_xticks(asked, [f"{speed:g}x" for speed in asked])
    axes.set_yticks(asked, [f"{speed:g}x" for speed in asked])
    axes.minorticks_off()
    if best:
        axes.legend(loc="upper left")
    figure.suptitle(f"Steps of a speed that was asked for (shaded: within {TOLERANCE:.0%})", x=0.01, ha="left", fontweight="bold", fontsize=12)
    save_plot(figure, path)
