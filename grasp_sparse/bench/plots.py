"""`grasp-sparse report`: draws the benchmarks' CSV files; which plot a file gets follows from its columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import pyplot as plt

from grasp_sparse.bench.accuracy_plots import plot_accuracy
from grasp_sparse.bench.asked_plots import plot_asked
from grasp_sparse.bench.layer_plots import layer_lines, plot_crossover, plot_layers
from grasp_sparse.bench.peer_plots import plot_peers
from grasp_sparse.bench.results import read_rows
from grasp_sparse.bench.scaling_plots import plot_fits
from grasp_sparse.bench.step_plots import plot_breakdown, plot_steps
from grasp_sparse.report.style import STYLE
from grasp_sparse.train.errors import UserError

_LAYERS = {"shape", "precision", "sparsity", "arm", "median_s"}
_STEPS = {"model", "sparsity", "pass", "arm", "median_s"}
Rows = list[dict[str, str]]


def _plot_device_steps(rows: Rows, path: Path) -> None:
    """Those on a device, in the columns of those on a CPU: a panel for each pattern and precision."""
    named = [row | {"budget": "flops", "model": ", ".join((row["model"], row["pattern"], row["planned_in"]))} for row in rows]
    plot_steps(named, path)


def _plot_layers(rows: Rows, path: Path) -> None:
    lines = layer_lines(rows)
    crossing = min(min(line.sparsity) for line in lines) < 0.75
    (plot_crossover if crossing else plot_layers)(lines, path, caches=rows[0].get("caches", "warm"))


# The first whose columns a file has.
_PLOTS: tuple[tuple[set[str], Callable[[Rows, Path], None]], ...] = (
    ({"study", "data", "model", "method", "target", "seed", "accuracy", "weight_sparsity", "vs best dense"}, plot_accuracy),
    ({"model", "budget", "sparsity", "arm", "category", "seconds"}, plot_breakdown),
    (_STEPS | {"budget"}, plot_steps),
    ({"model", "asked", "arm", "median_s"}, plot_asked),
    (_STEPS | {"pattern", "planned_in"}, _plot_device_steps),
    ({"measured", "shape", "nnz", "median_s", "fit_a_s", "fit_b_s"}, plot_fits),
    (_LAYERS | {"peer_version"}, plot_peers),
    (_LAYERS, _plot_layers),
)


def write_plots(path: Path, out: Path | None = None) -> list[Path]:
    """Draws a CSV file, or those in a folder that have a plot, into `out` (default: beside the file); returns the PNG files.

    Raises UserError for a path that is neither, and for a file, or a folder of nothing but files, without one.
    """
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise UserError(f"Expected CSV files or a run's result.json in {path}, got neither")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"Expected a CSV file, a folder of them or a folder of a run, got {path}, which does not exist")
    tables = {file: read_rows(file) for file in files}
    drawn = {file: draw for file, rows in tables.items() if (draw := _plot_of(rows))}
    if not drawn:
        columns = ", ".join(sorted(_columns(tables[files[0]]))) or "none"
        raise UserError(f"Expected columns of a benchmark in {files[0]}, got {columns}")
    plots = []
    with plt.rc_context(STYLE):
        for file, draw in drawn.items():
            plots.append((out or file.parent) / f"{file.stem}.png")
            plots[-1].parent.mkdir(parents=True, exist_ok=True)
            try:
                draw(tables[file], plots[-1])
            except ValueError as error:
                raise UserError(f"Expected numbers in the columns of {file}, got {error}; measure again") from error
    return plots


def _plot_of(rows: Rows) -> Callable[[Rows, Path], None] | None:
    return next((draw for columns, draw in _PLOTS if _columns(rows) >= columns), None)


def _columns(rows: Rows) -> set[str]:
    return set(rows[0]) if rows else set()
