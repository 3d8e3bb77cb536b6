"""What a step costs, dense beside sparse, as bars: its time, the phases of it, what it keeps in memory and sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from grasp_sparse.report.runs import SPARSE as SPARSE_ARM
from grasp_sparse.report.style import ACCENT, DENSE, INK, SPARSE, human_bytes, human_seconds

_WIDTH = 4.7  # inches, as in grasp_sparse.report.curves
_PHASES = {"forward": SPARSE, "loss": "#d6b48a", "backward": "#5eaaa3", "update": ACCENT, "other": DENSE}
_KINDS = {"parameters": SPARSE, "gradients": "#5eaaa3", "optimizer": "#a7d3cf", "indices": ACCENT}


def plot_times(arms: Mapping[str, Mapping[str, float]], reference: str) -> plt.Figure:
    """Median and quartiles of each arm's step; the sparse one against `reference`."""
    figure, axes = _rows(arms, "Time of a training step")
    medians, low, high = ([arm[key] * 1e3 for arm in arms.values()] for key in ("median", "q1", "q3"))
    spread = [[m - a for m, a in zip(medians, low)], [b - m for m, b in zip(medians, high)]]
    axes.barh(list(arms), medians, xerr=spread, color=[_colour(name) for name in arms], height=0.6,
              error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3})
    for row, name in enumerate(arms):
        note = human_seconds(arms[name]["median"])
        if name == SPARSE_ARM:
            note += f"  ·  {arms[reference]['median'] / arms[name]['median']:.2f}×"
        _note(axes, high[row], row, note, bold=name == SPARSE_ARM)
    axes.set(xlabel="milliseconds: median, quartiles", xlim=(0, max(high) * 1.34))
    return figure


def plot_phases(phases: Mapping[str, Mapping[str, float]]) -> plt.Figure:
    """Stacked seconds of the phases of a step, a bar an arm."""
    figure, axes = _rows(phases, "Where it goes", legend=True)
    _stack(axes, {arm: {phase: 1e3 * spent.get(phase, 0.0) for phase in _PHASES} for arm, spent in phases.items()}, _PHASES)
    totals = [1e3 * sum(spent.values()) for spent in phases.values()]
    for row, total in enumerate(totals):
        _note(axes, total, row, human_seconds(total / 1e3))
    axes.set(xlabel="milliseconds: median of each phase", xlim=(0, max(totals) * 1.25))
    return figure


def plot_memory(memory: Mapping[str, Mapping[str, int]]) -> plt.Figure:
    """Stacked megabytes that stay from step to step, a bar an arm."""
    figure, axes = _rows(memory, "Kept in memory from step to step", legend=True)
    _stack(axes, {arm: {kind: kinds[kind] / 1e6 for kind in _KINDS} for arm, kinds in memory.items()}, _KINDS)
    totals = [sum(kinds.values()) for kinds in memory.values()]
    for row, total in enumerate(totals):
        _note(axes, total / 1e6, row, human_bytes(total))
    axes.set(xlabel="megabytes", xlim=(0, max(totals) / 1e6 * 1.25))
    return figure


def plot_traffic(traffic: Mapping[str, int]) -> plt.Figure:
    """Megabytes that a rank all-reduces in a step, a bar an arm."""
    figure, axes = _rows(traffic, "All-reduced in a step")
    axes.barh(list(traffic), [size / 1e6 for size in traffic.values()], color=[_colour(name) for name in traffic], height=0.5)
    for row, size in enumerate(traffic.values()):
        _note(axes, size / 1e6, row, human_bytes(size))
    axes.set(xlabel="megabytes of gradients", xlim=(0, max(traffic.values()) / 1e6 * 1.25))
    return figure


def plot_density(layers: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """Kept share of each layer's weights, first layer on top, logarithmic; a layer that keeps nothing has no bar."""
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    figure, axes = plt.subplots(figsize=(6.4, 1.0 + 0.21 * len(layers)), layout="constrained")
    density = [layer["density"] for layer in layers]
    floor = min([share for share in density if share] or [1.0]) / 2
    colours = [SPARSE if layer["runs"] == "sparse" else DENSE for layer in layers]
    axes.barh(names, [max(share, floor) for share in density], color=colours, height=0.68)
    axes.set(xscale="log", xlim=(floor, 1.0), xlabel="share of the weights kept")
    axes.xaxis.set_major_locator(FixedLocator([10.0**-n for n in range(7)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for row, share in enumerate(density):
        inside = share > floor**0.35  # the bar is long: its label would not fit to the right of it
        light = inside and layers[row]["runs"] == "sparse"
        axes.annotate(f"{share:.2%}", (max(share, floor), row), xytext=(-5 if inside else 5, 0), textcoords="offset points",
                      ha="right" if inside else "left", va="center", fontsize=8, color="white" if light else INK)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (SPARSE, DENSE)]
    labels = ["sparse kernel", "dense kernel, pruned weights held at zero"]
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8.5)
    return figure


def _rows(arms: Mapping[str, Any], title: str, legend: bool = False) -> tuple[plt.Figure, Axes]:
    """Axes for one horizontal bar an arm, the first on top."""
    figure, axes = plt.subplots(figsize=(_WIDTH, 1.25 + 0.36 * len(arms) + 0.3 * legend), layout="constrained")
    axes.set(title=title, ylim=(len(arms) - 0.5, -0.5))
    axes.set_yticks(range(len(arms)), list(arms))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _stack(axes: Axes, parts: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    start = [0.0] * len(parts)
    for kind, colour in colours.items():
        width = [sizes[kind] for sizes in parts.values()]
        if any(width):
            axes.barh(list(parts), width, left=start, color=colour, height=0.55, label=kind, edgecolor="white", linewidth=0.6)
        start = [a + b for a, b in zip(start, width)]
    axes.figure.legend(loc="outside lower center", ncols=5, fontsize=8, columnspacing=1.0, handlelength=1.0, handletextpad=0.5)


def _colour(arm: str) -> str:
    return SPARSE if arm == SPARSE_ARM else DENSE


def _note(axes: Axes, x: float, row: int, text: str, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.annotate(text, (x, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight=weight)
