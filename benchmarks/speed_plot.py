"""docs/speed.png: speed-up against what is removed, of layers and of training steps, a line a machine."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks.speed_figures import GROUPS, LAYER_CASES, MACHINES, MODELS, SHORT, STEP_CASES, STEPS, layer_speeds, step_speeds
from grasp_sparse.bench.layer_plots import speed_axis
from grasp_sparse.report.style import SERIES, STYLE, save_plot


def plot(path: Path) -> None:
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 6.6), layout="constrained")
        above, below = figure.subfigures(2, 1)
        _layers(above)
        _steps(below)
        above.axes[0].legend(loc="upper left")
        save_plot(figure, path)


def _layers(figure: plt.SubFigure) -> None:
    speeds = {
        group: {machine: layer_speeds(f"layers{ending}", group) for machine, ending in MACHINES.items()} for group in GROUPS
    }
    highest = max(max(found.values()) for machines in speeds.values() for found in machines.values())
    grid = figure.subplots(1, len(GROUPS), sharey=True)
    for axes, (group, machines) in zip(grid, speeds.items(), strict=True):
        for (machine, found), colour in zip(machines.items(), SERIES):
            axes.plot(range(len(LAYER_CASES)), [found[share] for share in LAYER_CASES], "o-", ms=4, color=colour, label=machine)
        axes.set_xticks(range(len(LAYER_CASES)), [f"{share:.0%}" for share in LAYER_CASES])
        axes.set(title=SHORT[group], xlabel="of the weights removed")
        speed_axis(axes, 1, highest)
    grid[0].set_ylabel("times as fast as dense")
    figure.suptitle("Layers, forward and backward (geometric means)", x=0.01, ha="left", fontweight="bold", fontsize=12)


def _steps(figure: plt.SubFigure) -> None:
    speeds = {machine: step_speeds(name) for machine, name in STEPS.items()}
    highest = max(speed.high for found in speeds.values() for speed in found.values())
    grid = figure.subplots(1, len(MODELS), sharey=True)
    for axes, (model, label) in zip(grid, MODELS.items(), strict=True):
        for (machine, found), colour in zip(speeds.items(), SERIES):
            for budget, places in (("flops", range(3)), ("weights", range(3, 6))):
                own = [found[model, *case] for case in STEP_CASES if case[0] == budget]
                axes.plot(list(places), [speed.median for speed in own], "o-", ms=4, color=colour)
                axes.fill_between(list(places), [speed.low for speed in own], [speed.high for speed in own], color=colour, alpha=0.13, lw=0)
        axes.axvline(2.5, color="#cbd5e1", lw=1)
        axes.set_xticks(range(len(STEP_CASES)), [f"{float(share):.0%}" for _, share in STEP_CASES], fontsize=8.5)
        axes.set(title=label.partition(",")[0], xlabel="multiply-adds  |  weights removed")
        speed_axis(axes, 1, highest)
    grid[0].set_ylabel("times as fast as dense")
    figure.suptitle("Training steps (masks by GraSP)", x=0.01, ha="left", fontweight="bold", fontsize=12)
