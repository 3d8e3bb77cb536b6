"""Plots of single layers: speed-up against sparsity, and the density from which on dense is faster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from grasp_sparse.bench.results import DENSE, SPARSE, geometric_mean, kind_of
from grasp_sparse.report.style import ACCENT, INK, save_plot

_WHOLE = "forward+backward"
_TICKS = (0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 50)


class Line(NamedTuple):
    """Speed of one shape: `speed` times as fast as the fastest dense arm, at each share of weights removed, with quartiles."""

    label: str
    group: str
    sparsity: list[float]
    speed: list[float]
    low: list[float]
    high: list[float]


def layer_lines(rows: Sequence[Mapping[str, str]]) -> list[Line]:
    """A line per shape, precision and pattern: at each sparsity the faster sparse arm against the fastest dense arm, forward and
    backward; rows of other passes are left out.

    low, high: quartile of the one against the opposite quartile of the other. Raises ValueError for rows without a dense or a
    sparse arm.
    """
    lines = []
    rows = [row for row in rows if row.get("pass", _WHOLE) == _WHOLE]
    for shape, precision, pattern in dict.fromkeys(map(_line_of, rows)):
        own = [row for row in rows if _line_of(row) == (shape, precision, pattern)]
        dense = min((row for row in own if kind_of(row["arm"]) == DENSE), key=lambda row: float(row["median_s"]))
        sparse: dict[float, Mapping[str, str]] = {}
        for row in own:
            share = float(row["sparsity"])
            if kind_of(row["arm"]) == SPARSE and float(row["median_s"]) < float(sparse.get(share, {"median_s": "inf"})["median_s"]):
                sparse[share] = row
        if not sparse:
            raise ValueError(f"no sparse arm of {shape}")
        shares = sorted(sparse)
        chosen = [sparse[share] for share in shares]
        group = own[0].get("group") or shape.split()[0]
        group += "" if precision == "float32" else f", {precision}"
        group += "" if pattern == "unstructured" else f", {pattern}"
        lines.append(Line(
            shape, group, shares,
            [float(dense["median_s"]) / float(row["median_s"]) for row in chosen],
            [float(dense["q1_s"]) / float(row["q3_s"]) for row in chosen],
            [float(dense["q3_s"]) / float(row["q1_s"]) for row in chosen],
        ))  # fmt: skip
    return lines


def _line_of(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["shape"], row["precision"], row.get("pattern") or "unstructured"


def _shades(count: int) -> list[tuple[float, ...]]:
    """`count` colours in even steps, dark to light."""
    palette = colormaps["viridis"]
    return [palette(0.12 + 0.74 * i / max(1, count - 1)) for i in range(count)]


def speed_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis of speeds with ticks that read 1x, 2x, 5x, and the line where dense is as fast."""
    axes.set_yscale("log")
    axes.set_ylim(min(0.9, low / 1.15), high * 1.25)
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axhline(1, color=INK, lw=1.1, ls=(0, (4, 3)), zorder=1)


def plot_layers(lines: Sequence[Line], path: Path, caches: str = "warm") -> None:
    """Speed-up against sparsity, logarithmic, a panel a group, a line a shape, the geometric mean of the panel in bold."""
    panels: dict[str, list[Line]] = {}
    for line in lines:
        batch = line.label.rpartition(" batch ")[2]
        many = len([other for other in lines if other.group == line.group]) > 8
        panels.setdefault(f"{line.group}, batch {batch}" if many else line.group, []).append(line)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.1 * columns + 0.6, 3.9 * rows + 0.3), layout="constrained", squeeze=False, sharey=True
    )
    low, high = min(min(line.low) for line in lines), max(max(line.high) for line in lines)
    for axes, (title, members) in zip(grid.flat, panels.items()):
        _layer_panel(axes, title, members)
        speed_axis(axes, low, high)
    for axes in list(grid.flat)[len(panels):]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("times as fast as the fastest dense path")
    note = "every call with its data evicted" if caches == "cold" else "data warm as between the layers of a network"
    figure.suptitle(f"One layer, forward and backward ({note})", x=0.01, ha="left", fontweight="bold", fontsize=12)
    save_plot(figure, path)


def _layer_panel(axes: Axes, title: str, members: Sequence[Line]) -> None:
    shares = sorted({share for line in members for share in line.sparsity})
    place = {share: i for i, share in enumerate(shares)}
    labelled = len(members) <= 6
    common = {line.label.rpartition(" batch ")[2] for line in members}
    for line, colour in zip(members, _shades(len(members))):
        x = [place[share] for share in line.sparsity]
        label = line.label.rpartition(" batch ")[0] if len(common) == 1 else line.label.replace(" batch ", ", batch ")
        axes.plot(x, line.speed, color=colour, marker="o", ms=4 if labelled else 2.5, lw=1.8 if labelled else 1.0,
                  alpha=1 if labelled else 0.65, label=label.replace("->", "→") if labelled else None)
        if labelled:
            axes.fill_between(x, line.low, line.high, color=colour, alpha=0.13, lw=0)
    if len(members) > 1:
        complete = [share for share in shares if all(share in line.sparsity for line in members)]
        means = [geometric_mean([line.speed[line.sparsity.index(share)] for line in members]) for share in complete]
        x = [place[share] for share in complete]
        axes.plot(x, means, color=ACCENT, lw=2.8, marker="D", ms=6, zorder=5, label=f"geometric mean of {len(members)} shapes")
        for here, mean in zip(x, means):
            axes.annotate(f"{mean:.1f}x" if mean < 9.95 else f"{mean:.0f}x", (here, mean), xytext=(0, 8), textcoords="offset points",
                          ha="center", color=ACCENT, fontweight="bold", fontsize=9, zorder=6,
                          bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.8})
    axes.set_xticks(range(len(shares)), [f"{share:.2%}".replace(".00", "") for share in shares])
    axes.set(title=title, xlabel="weights removed", xlim=(-0.3, len(shares) - 0.7))
    axes.legend(fontsize=7.5, loc="upper left", handlelength=1.6, labelspacing=0.35)


def plot_crossover(lines: Sequence[Line], path: Path, caches: str = "warm") -> None:
    """Speed-up against density: where each line falls below 1x the layer had better stay dense."""
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for line, colour in zip(lines, _shades(len(lines))):
        points = sorted((1 - share, speed, low, high) for share, speed, low, high in zip(line.sparsity, line.speed, line.low, line.high))
        density, speed, low, high = map(list, zip(*points, strict=True))
        crossing = crossover(density, speed)
        always = f"sparse {'faster' if speed[-1] > 1 else 'slower'} at all of these"
        end = always if crossing is None else f"even at {crossing:.0%}"
        axes.plot(density, speed, color=colour, marker="o", ms=4, label=f"{line.label.replace('->', '→')}: {end}")
        axes.fill_between(density, low, high, color=colour, alpha=0.13, lw=0)
        if crossing is not None:
            axes.plot(crossing, 1, "o", ms=9, mfc="white", mec=colour, mew=2, zorder=5)
    speed_axis(axes, min(min(line.low) for line in lines), max(max(line.high) for line in lines))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set(xlabel="density (share of weights kept)", ylabel="times as fast as the fastest dense path",
             title=f"From which density on a layer had better stay dense ({caches} caches)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_plot(figure, path)


def crossover(density: Sequence[float], speed: Sequence[float]) -> float | None:
    """The density, ascending, at which `speed` first falls to 1, between two points by straight lines; None if it never does."""
    for (d0, s0), (d1, s1) in zip(zip(density, speed), zip(density[1:], speed[1:])):
        if s0 > 1 >= s1:
            return d0 + (d1 - d0) * (s0 - 1) / (s0 - s1)
    return None
