"""Plot of sparse implementations beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from grasp_sparse.bench.layer_plots import speed_axis
from grasp_sparse.bench.results import DENSE, SPARSE, geometric_mean, kind_of
from grasp_sparse.report.style import FAINT, save_plot
from grasp_sparse.report.style import DENSE as GREY
from grasp_sparse.report.style import SPARSE as PETROL

Rows = Sequence[Mapping[str, str]]


def plot_peers(rows: Rows, path: Path) -> None:
    """Bars: each implementation's speed against the fastest dense path, a row of panels a pass, geometric mean over shapes."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, grid = plt.subplots(
        len(passes), len(groups), figsize=(4.8 * len(groups), 3.2 * len(passes)), layout="constrained", squeeze=False, sharey=True
    )
    speeds = []
    for row_axes, which in zip(grid, passes):
        for axes, group in zip(row_axes, groups):
            speeds += _peer_panel(axes, [row for row in rows if row["pass"] == which and row["group"] == group], f"{group}, {which}")
    for axes in grid.flat:
        speed_axis(axes, min(speeds), max(speeds))
    for axes in grid[:, 0]:
        axes.set_ylabel("times as fast\nas the fastest dense path")
    figure.suptitle("Sparse implementations, geometric means over shapes", x=0.01, ha="left", fontweight="bold", fontsize=12)
    save_plot(figure, path)


def _peer_panel(axes: Axes, rows: Rows, title: str) -> list[float]:
    """Draws it; returns the speeds in it."""
    speeds: dict[str, dict[float, list[float]]] = {}
    for shape, share in dict.fromkeys((row["shape"], float(row["sparsity"])) for row in rows):
        best: dict[str, float] = {}
        for row in rows:
            if (row["shape"], float(row["sparsity"])) == (shape, share) and kind_of(row["arm"]) != DENSE:
                name = "grasp_sparse" if kind_of(row["arm"]) == SPARSE else row["arm"]
                best[name] = max(best.get(name, 0.0), float(row["vs best dense"]))
        for name, speed in best.items():
            speeds.setdefault(name, {}).setdefault(share, []).append(speed)
    shares = sorted({share for by_share in speeds.values() for share in by_share})
    names = sorted(speeds, key=lambda name: (name != "grasp_sparse", name))
    colours = {"grasp_sparse": PETROL} | dict(zip([n for n in names if n != "grasp_sparse"], (GREY, "#d6b48a", FAINT)))
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        x = [i + (offset - (len(names) - 1) / 2) * width for i, share in enumerate(shares) if share in speeds[name]]
        heights = [geometric_mean(speeds[name][share]) for share in shares if share in speeds[name]]
        axes.bar(x, [h - 1e-3 for h in heights], width * 0.92, bottom=1e-3, color=colours[name], label=name)
        for here, height in zip(x, heights):
            axes.text(here, height * 1.03, f"{height:.1f}x" if height < 9.95 else f"{height:.0f}x", ha="center", va="bottom", fontsize=7.5)
    axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axes.set(title=title, xlabel="weights removed")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, loc="upper left")
    return [speed for by_share in speeds.values() for values in by_share.values() for speed in values]
