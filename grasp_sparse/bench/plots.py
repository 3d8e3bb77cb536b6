"""`grasp-sparse report`: draws the benchmarks' CSV files; which plot a file gets follows from its columns."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt

from grasp_sparse.bench.accuracy_plots import plot_accuracy
from grasp_sparse.bench.layer_plots import layer_lines, plot_crossover, plot_layers
from grasp_sparse.bench.peer_plots import plot_peers
from grasp_sparse.bench.results import read_rows
from grasp_sparse.bench.scaling_plots import plot_fits
from grasp_sparse.bench.step_plots import plot_breakdown, plot_steps
from grasp_sparse.report.style import STYLE
from grasp_sparse.train.errors import UserError

_LAYERS = {"shape", "precision", "sparsity", "arm", "median_s"}
_PEERS = _LAYERS | {"peer_version"}
_STEPS = {"model", "budget", "sparsity", "pass", "arm", "median_s"}
_DEVICE_STEPS = {"model", "pattern", "planned_in", "sparsity", "pass", "arm", "median_s"}
_SCALING = {"measured", "shape", "nnz", "median_s", "fit_a_s", "fit_b_s"}
_ACCURACY = {"study", "data", "model", "method", "target", "seed", "accuracy", "weight_sparsity", "vs best dense"}
_BREAKDOWN = {"model", "budget", "sparsity", "arm", "category", "seconds"}


def write_plots(path: Path, out: Path | None = None) -> list[Path]:
    """Draws a CSV file, or those in a folder that have a plot, into `out` (default: beside the file); returns the PNG files.

    Raises UserError for a path that is neither, and for a file, or a folder of nothing but files, without one.
    """
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise UserError(f"Expected CSV files or a run's result.json in {path}, got neither")
        files = [file for file in files if _has_plot(file)] or files
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"Expected a CSV file, a folder of them or a folder of a run, got {path}, which does not exist")
    plots = []
    with plt.rc_context(STYLE):
        for file in files:
            plots.append(_plot(file, out or file.parent))
    return plots


def _has_plot(file: Path) -> bool:
    columns = _columns(read_rows(file))
    return any(columns >= known for known in (_ACCURACY, _BREAKDOWN, _STEPS, _DEVICE_STEPS, _SCALING, _LAYERS))


def _columns(rows: list[dict[str, str]]) -> set[str]:
    return set(rows[0]) if rows else set()


def _as_step(row: dict[str, str]) -> dict[str, str]:
    """A step on a device, in the columns of those on a CPU: a panel for each pattern and precision."""
    return row | {"budget": "flops", "model": ", ".join((row["model"], row["pattern"], row["planned_in"]))}


def _plot(file: Path, folder: Path) -> Path:
    rows = read_rows(file)
    columns = _columns(rows)
    target = folder / f"{file.stem}.png"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if columns >= _ACCURACY:
            plot_accuracy(rows, target)
        elif columns >= _BREAKDOWN:
            plot_breakdown(rows, target)
        elif columns >= _STEPS:
            plot_steps(rows, target)
        elif columns >= _DEVICE_STEPS:
            plot_steps([_as_step(row) for row in rows], target)
        elif columns >= _SCALING:
            plot_fits(rows, target)
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
