"""RUN/report.html: what a run reached, what its steps cost beside dense ones, what it kept, how to repeat it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from grasp_sparse.report.bars import plot_density, plot_memory, plot_phases, plot_times, plot_traffic
from grasp_sparse.report.curves import QUANTITIES, plot_curve
from grasp_sparse.report.figures import inline_svg
from grasp_sparse.report.pages import write_page
from grasp_sparse.report.recipe import changed_settings, recipe_toml
from grasp_sparse.report.runs import SPARSE, Run, in_words, read_run
from grasp_sparse.report.style import STYLE, human_bytes, human_seconds
from grasp_sparse.train.logging import human_duration
from grasp_sparse.train.run import REPORT_NAME

_EPOCH_COLUMNS = {
    "lr": "learning rate", "train_loss": "training loss", "train_accuracy": "training accuracy", "test_loss": "test loss",
    "test_accuracy": "test accuracy", "ema_accuracy": "of the moving average", "images_per_s": "images/s", "seconds": "seconds so far",
    "corrupt_images": "images that could not be read",
}  # fmt: skip


def write_report(run_dir: Path, folder: Path | None = None) -> Path:
    """Write the report of the finished run in `run_dir`, from its files alone, there or into `folder`; returns the page's path."""
    run = read_run(run_dir)
    values = {
        "title": f"{run.name}: {run.config['model']} on {run.result['data']['name']}", "run": run, "keys": _keys(run),
        "epochs": _epochs(run), "timing_note": _timing_note(run), "traffic_note": _traffic_note(run), "times": _times(run),
        "bytes": _bytes(run), "layers": _layers(run), "changed": changed_settings(run.config), "recipe": recipe_toml(run.config),
        "environment": [(name.replace("_", " "), value) for name, value in run.result["environment"].items() if value is not None],
        **_figures(run),
    }  # fmt: skip
    return write_page("run.html", values, (folder or run_dir) / REPORT_NAME)


def _figures(run: Run) -> dict[str, Any]:
    with plt.rc_context(STYLE):
        figures: dict[str, Any] = {
            "curves": [inline_svg(plot_curve(run.rows, what), what, f"Training and test {what} by epoch") for what in QUANTITIES],
            "costs": [], "sizes": [], "density": None,
        }  # fmt: skip
        if run.steps:
            times = plot_times(run.all_steps, next(iter(run.steps)))
            figures["costs"].append(inline_svg(times, "times", "Seconds of a training step, dense and sparse"))
        if run.phases:
            figures["costs"].append(inline_svg(plot_phases(run.phases), "phases", "Seconds of each phase of a step, dense and sparse"))
        if run.memory:
            memory, traffic = plot_memory(run.memory), plot_traffic(run.traffic)
            figures["sizes"] = [
                inline_svg(memory, "memory", "Bytes kept in memory, dense and sparse"),
                inline_svg(traffic, "traffic", "Bytes all-reduced in a step, dense and sparse"),
            ]
        if run.pruning:
            density = plot_density(run.pruning["layers"])
            figures["density"] = inline_svg(density, "density", "Share of the weights kept in each layer")
    return figures


def _keys(run: Run) -> list[tuple[str, str]]:
    """The numbers to read first."""
    training = run.result["training"]
    keys = [(f"test accuracy after the last epoch ({training['epochs']})", f"{training['last_accuracy']:.2%}"),
            (f"best, after epoch {training['best_epoch']}", f"{training['best_accuracy']:.2%}")]
    if run.pruning:
        keys.append(("of the weights removed", f"{run.pruning['weight_sparsity']:.2%}"))
    if run.speedup:
        keys.append(("a step as fast as a dense one", f"{run.speedup:.2f}×"))
    if SPARSE in run.memory:
        dense, sparse = (sum(run.memory[arm].values()) for arm in ("dense", SPARSE))
        keys.append(("of the dense memory for weights and their state", f"{sparse / dense:.1%}"))
    if corrupt := run.result.get("corrupt_files"):
        keys.append(("image files that could not be read", f"{len(corrupt):,}"))
    keys.append(("training, evaluation included", human_duration(training["seconds"])))
    if "ema_accuracy" in run.rows[-1]:
        keys.insert(1, ("of the moving average of its weights", f"{run.rows[-1]['ema_accuracy']:.2%}"))
    return keys


def _traffic_note(run: Run) -> str:
    """What was measured between ranks, if there were several."""
    if run.ranks == 1:
        return "One rank trained this run; several would send every gradient once a step."
    scale = run.result["scale"]
    return (
        f"{run.ranks} ranks trained this run and sent, as measured, {human_bytes(scale['reduced_bytes'])} each a step: "
        f"{scale['values']:,} kept weights and {scale['dense_parameters']:,} parameters that are dense."
    )


def _timing_note(run: Run) -> str:
    if not run.steps:
        return ""
    environment = run.timed_in
    parts = run.config.get("accumulate", 1)
    batch = f"{run.config['batch_size']}" + (f" x {parts} micro-batches" if parts > 1 else "")
    note = (
        f"A step is forward, loss, backward and update on a real batch of {batch}; arms in turns in one process, "
        f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}, allocator: {environment['allocator']}."
    )
    if (there := in_words(environment)) != in_words(run.result["environment"]):
        note += f" Timed on {there}; training began elsewhere."
    if run.speedup:
        note += f" The best dense path here is {next(iter(run.steps))}; the sparse step is {run.speedup:.2f} times as fast."
    return note


def _times(run: Run) -> tuple[Iterable[str], list[list[str]]]:
    """A row an arm: median, quartiles, phases where they were measured, speed against the best dense arm."""
    names = list(next(iter(run.phases.values()), ()))
    header = ("step", "median", "quartiles", "steps", *names, "speed")
    rows = []
    for arm, time in run.all_steps.items():
        reference = run.all_steps[next(iter(run.steps))]["median"]
        phases = [human_seconds(run.phases[arm][name]) if arm in run.phases else "" for name in names]
        quartiles = f"{human_seconds(time['q1'])} – {human_seconds(time['q3'])}"
        rows.append([arm, human_seconds(time["median"]), quartiles, str(time["count"]), *phases, f"{reference / time['median']:.2f}×"])
    return header, rows


def _bytes(run: Run) -> tuple[Iterable[str], list[list[str]]]:
    """A row a kind, a column an arm."""
    arms = list(run.memory)
    kinds = list(next(iter(run.memory.values()), ()))
    counts = {kind: [run.memory[arm][kind] for arm in arms] for kind in kinds}
    counts["all"] = [sum(run.memory[arm].values()) for arm in arms]
    counts["all-reduced in a step"] = [run.traffic[arm] for arm in arms]
    compared = SPARSE in arms
    rows = []
    for kind, sizes in counts.items():
        share = [f"{sizes[1] / sizes[0]:.2%}" if sizes[0] else ""] if compared else []
        rows.append([kind, *(human_bytes(size) if size else "–" for size in sizes), *share])
    return ("bytes", *arms, *(["share"] if compared else [])), rows


def _layers(run: Run) -> tuple[Iterable[str], list[list[str]]]:
    header = ("layer", "shape", "kept", "of", "density", "multiply-adds kept", "runs")
    rows = []
    for layer in run.pruning["layers"] if run.pruning else ():
        shape = "×".join(map(str, layer["shape"]))
        rows.append([layer["name"], shape, f"{layer['kept']:,}", f"{layer['total']:,}", f"{layer['density']:.3%}",
                     f"{layer['flops_kept']:,}", layer["runs"]])
    return header, rows


def _epochs(run: Run) -> tuple[Iterable[str], list[list[str]]]:
    columns = {column: title for column, title in _EPOCH_COLUMNS.items() if column in run.rows[0]}
    return ("epoch", *columns.values()), [[str(row["epoch"]), *(_number(column, row) for column in columns)] for row in run.rows]


def _number(column: str, row: Mapping[str, Any]) -> str:
    value = row[column]
    if column.endswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:,.0f}" if column in ("images_per_s", "seconds") else f"{value:.4g}"
