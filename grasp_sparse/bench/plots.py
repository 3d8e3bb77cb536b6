"""Plots of the benchmarks' CSV files; which one is drawn follows from a file's columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from grasp_sparse.bench.breakdown import CATEGORIES
from grasp_sparse.bench.results import DENSE, SPARSE, geometric_mean, kind_of, read_rows
from grasp_sparse.report import ACCENT, FAINT, INK, STYLE, save_plot
from grasp_sparse.train.errors import UserError

Rows = list[dict[str, str]]
_LAYERS = {"shape", "sparsity", "arm", "median_s"}
_PEERS = _LAYERS | {"peer_version"}
_STEPS = {"model", "budget", "sparsity", "arm", "median_s"}
_BREAKDOWN = {"model", "budget", "sparsity", "arm", "category", "seconds"}
_TICKS = (0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 50)
_COLOURS = {
    "conv and linear": "#0f766e", "norm": "#5eaaa3", "activation": "#a7d3cf", "pooling": "#d6b48a", "optimizer": ACCENT,
    "other": "#94a3b8",
}  # fmt: skip


class Line(NamedTuple):
    """Speed of one shape: `speed` times as fast as the fastest dense arm, at each share of weights removed, with quartiles."""

    label: str
    group: str
    sparsity: list[float]
    speed: list[float]
    low: list[float]
    high: list[float]


def write_plots(path: Path, out: Path | None = None) -> list[Path]:
    """Draws a CSV file, or every CSV file in a folder, into `out` (default: beside the file); returns the PNG files.

    Raises UserError for a path that is neither, and for a file that no benchmark of this version has written.
    """
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise UserError(f"Expected CSV files or a run's result.json in {path}, got neither")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"Expected a CSV file, a folder of them or a folder of a run, got {path}, which does not exist")
    plots = []
    with plt.rc_context(STYLE):
        for file in files:
            plots.append(_plot(file, out or file.parent))
    return plots


def _plot(file: Path, folder: Path) -> Path:
    rows = read_rows(file)
    columns = set(rows[0]) if rows else set()
    target = folder / f"{file.stem}.png"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if columns >= _BREAKDOWN:
            plot_breakdown(rows, target)
        elif columns >= _STEPS:
            plot_steps(rows, target)
        elif columns >= _PEERS:
            plot_peers(rows, target)
        elif columns >= _LAYERS:
            lines = layer_lines(rows)
            crossing = min(min(line.sparsity) for line in lines) < 0.75
            (plot_crossover if crossing else plot_layers)(lines, target, caches=rows[0].get("caches", "warm"))
        else:
            raise UserError(f"Expected columns of a benchmark in {file}, got {', '.join(sorted(columns)) or 'none'}")
    except ValueError as error:
        raise UserError(f"Expected numbers in the columns of {file}, got {error}; measure again") from error
    return target


def layer_lines(rows: Rows) -> list[Line]:
    """A line per shape: at each sparsity the faster sparse arm against the fastest dense arm.

    low, high: quartile of the one against the opposite quartile of the other. Raises ValueError for rows without a dense or a
    sparse arm.
    """
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        dense = min((row for row in own if kind_of(row["arm"]) == DENSE), key=lambda row: float(row["median_s"]))
        sparse: dict[float, dict[str, str]] = {}
        for row in own:
            share = float(row["sparsity"])
            if kind_of(row["arm"]) == SPARSE and float(row["median_s"]) < float(sparse.get(share, {"median_s": "inf"})["median_s"]):
                sparse[share] = row
        if not sparse:
            raise ValueError(f"no sparse arm of {shape}")
        shares = sorted(sparse)
        chosen = [sparse[share] for share in shares]
        group = own[0].get("group") or shape.split()[0]
        lines.append(Line(
            shape, group, shares,
            [float(dense["median_s"]) / float(row["median_s"]) for row in chosen],
            [float(dense["q1_s"]) / float(row["q3_s"]) for row in chosen],
            [float(dense["q3_s"]) / float(row["q1_s"]) for row in chosen],
        ))  # fmt: skip
    return lines


def _shades(count: int) -> list[tuple[float, ...]]:
    """Colours from petrol to sand, of even steps."""
    palette = colormaps["viridis"]
    return [palette(0.12 + 0.74 * i / max(1, count - 1)) for i in range(count)]


def _speed_axis(axes: Axes, low: float, high: float) -> None:
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
        _speed_axis(axes, low, high)
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
            axes.annotate(f"{mean:.2g}x" if mean < 10 else f"{mean:.0f}x", (here, mean), xytext=(0, 8), textcoords="offset points",
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
        end = "sparse is faster throughout" if crossing is None else f"even at {crossing:.0%}"
        axes.plot(density, speed, color=colour, marker="o", ms=4, label=f"{line.label.replace('->', '→')}: {end}")
        axes.fill_between(density, low, high, color=colour, alpha=0.13, lw=0)
        if crossing is not None:
            axes.plot(crossing, 1, "o", ms=9, mfc="white", mec=colour, mew=2, zorder=5)
    _speed_axis(axes, min(min(line.low) for line in lines), max(max(line.high) for line in lines))
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
        _speed_axis(axes, min(speeds), max(speeds))
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
    colours = {"grasp_sparse": "#0f766e"} | dict(zip([n for n in names if n != "grasp_sparse"], ("#94a3b8", "#d6b48a", FAINT)))
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        x = [i + (offset - (len(names) - 1) / 2) * width for i, share in enumerate(shares) if share in speeds[name]]
        heights = [geometric_mean(speeds[name][share]) for share in shares if share in speeds[name]]
        axes.bar(x, [h - 1e-3 for h in heights], width * 0.92, bottom=1e-3, color=colours[name], label=name)
        for here, height in zip(x, heights):
            axes.text(here, height * 1.03, f"{height:.2g}x" if height < 10 else f"{height:.0f}x", ha="center", va="bottom", fontsize=7.5)
    axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axes.set(title=title, xlabel="weights removed")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, loc="upper left")
    return [speed for by_share in speeds.values() for values in by_share.values() for speed in values]


def plot_steps(rows: Rows, path: Path) -> None:
    """Bars: how many times as fast the faster sparse step is as the fastest dense one, by model, budget and sparsity."""
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
                colours.append("#0f766e" if budget == "flops" else "#94a3b8")
        axes.bar(range(len(labels)), speeds, color=colours, width=0.7)
        for x, speed in enumerate(speeds):
            axes.text(x, speed, f"{speed:.1f}x", ha="center", va="bottom", fontsize=8.5, fontweight="bold")
        axes.axhline(1, color=INK, lw=1.1, ls=(0, (4, 3)))
        axes.set_xticks(range(len(labels)), labels)
        axes.set(title=model, xlabel="removed")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
    grid[0, 0].set_ylabel("times as fast as the fastest dense step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#0f766e", "#94a3b8")]
    figure.legend(handles, ["of the multiply-adds", "of the weights"], loc="outside lower center", ncols=2)
    figure.suptitle("A whole training step", x=0.01, ha="left", fontweight="bold", fontsize=12)
    save_plot(figure, path)


def plot_breakdown(rows: Rows, path: Path) -> None:
    """Stacked bars, a panel a model: where the time of the fastest dense and of the fastest sparse step goes."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    bars = {model: _bars([row for row in rows if row["model"] == model]) for model in models}
    heights = [len(found) for found in bars.values()]
    figure, grid = plt.subplots(
        len(models), 1, figsize=(9, 1.3 + sum(0.34 * count + 0.75 for count in heights)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": [count + 0.6 for count in heights]},
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
    grid[-1, 0].set_xlabel("milliseconds a training step, under the profiler")
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[category]) for category in CATEGORIES]
    figure.legend(handles, CATEGORIES, loc="outside upper center", ncols=len(CATEGORIES), fontsize=8.5, columnspacing=1.2, handlelength=1.2)
    save_plot(figure, path)


def _bars(rows: Rows) -> dict[str, dict[str, float]]:
    """Label -> category -> seconds: the dense step of the first case, then the sparse step of each."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        what = "multiply-adds" if row["budget"] == "flops" else row["budget"]
        label = DENSE if kind_of(row["arm"]) == DENSE else f"{float(row['sparsity']):.0%} of {what}"
        bars.setdefault(label, {}).setdefault(row["category"], float(row["seconds"]))
    return bars
