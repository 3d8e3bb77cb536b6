"""What sparse networks learn, from benchmarks/results/accuracy.csv and interrupted.json.

    python -m benchmarks.accuracy_page            print the tables of docs/accuracy.md
    python -m benchmarks.accuracy_page --write    put them into docs/accuracy.md and README.md, and draw docs/accuracy.png

A test holds both against what this prints.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks.accuracy_studies import STUDIES
from benchmarks.pages import README, Blocks, print_or_write, table
from benchmarks.runner import RESULTS
from grasp_sparse.bench.accuracy_plots import plot_accuracy
from grasp_sparse.bench.results import read_rows
from grasp_sparse.report.style import STYLE, human_bytes, human_seconds

DOCUMENT = README.parent / "docs" / "accuracy.md"
SPEEDS = (2.0, 2.5, 3.0, 3.5, 4.0)
Runs = Sequence[Mapping[str, str]]


def all_rows() -> list[dict[str, str]]:
    return read_rows(RESULTS / "accuracy.csv")


def rows_of(study: str) -> list[dict[str, str]]:
    """The rows of a study, in the order of its trials."""
    order = [(trial.method, trial.target) for trial in STUDIES[study]()]
    rows = [row for row in all_rows() if row["study"] == study]
    return sorted(rows, key=lambda row: (row["data"] != "fashion-mnist", order.index((row["method"], row["target"])), int(row["seed"])))


def grouped(rows: Runs, *names: str) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def mean(runs: Runs, name: str) -> float:
    return statistics.fmean(float(run[name]) for run in runs)


def accuracy(runs: Runs) -> str:
    """Mean and standard deviation over the seeds, in per cent."""
    values = [100 * float(run["accuracy"]) for run in runs]
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def setting(study: str) -> str:
    """Network, epochs and seeds of a study, a line a data set."""
    lines = []
    for (data, model), runs in grouped(rows_of(study), "data", "model").items():
        seeds = len({run["seed"] for run in runs})
        lines.append(f"{data}, {model}, {_one(runs, 'epochs')} epochs, {seeds} seed{'s' * (seeds > 1)}")
    return "; ".join(lines) + "."


def budgets_setting() -> str:
    """And what of the study has no runs."""
    found = {(row["data"], row["method"], row["target"]) for row in rows_of("budgets")}
    names = {data == "fashion-mnist": data for data, _, _ in found}
    lacking: dict[str, list[str]] = {}
    for trial in STUDIES["budgets"]():
        data = names.get(trial.recipe["data"] == "fashion-mnist", trial.recipe["data"])
        if (data, trial.method, trial.target) not in found:
            lacking.setdefault(data, []).append(f"{trial.method} {_limit(trial.target)}")
    return " ".join([setting("budgets"), *(f"Not run on {data}: {', '.join(cases)}." for data, cases in lacking.items())])


def _limit(target: str) -> str:
    return f"{target[:-1]}×" if target.endswith("x") else f"{float(target):.0%}"


def _one(runs: Runs, name: str) -> str:
    """The value that all runs have. Raises ValueError if there are several."""
    (value,) = {run[name] for run in runs}
    return value


def criteria_table() -> str:
    groups = grouped(rows_of("criteria"), "method", "target")
    targets = list(dict.fromkeys(target for method, target in groups if method != "dense"))
    methods = list(dict.fromkeys(method for method, _ in groups if method != "dense"))
    rows = [(method, *(accuracy(groups[method, target]) for target in targets)) for method in methods]
    dense = accuracy(groups["dense", "0"])
    return table((f"test accuracy, % (dense: {dense})", *(f"{float(target):.0%}" for target in targets)), rows)


def budgets_table() -> str:
    header = ("test accuracy, %", "limit", "weights removed", "multiply-adds removed", "speed of a step", "accuracy")
    rows = []
    for (data, method, target), runs in grouped(rows_of("budgets"), "data", "method", "target").items():
        if method == "dense":
            rows.append((f"{data}: dense", "", "", "", "1×", accuracy(runs)))
            continue
        removed = (f"{mean(runs, name):.1%}" for name in ("weight_sparsity", "flop_sparsity"))
        rows.append((f"{data}: {method}", _limit(target), *removed, f"{mean(runs, 'vs best dense'):.2f}×", accuracy(runs)))
    return table(header, rows)


def equal_time() -> dict[str, dict[str, dict[float, float]]]:
    """Data set -> method -> speed of a step -> the best mean accuracy where it is that fast or faster.

    On the straight line (in the logarithm of speed) between two limits, or at a limit whose step is faster: a method may have
    none so slow, and one that is better there still is no worse a choice for its speed.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for (data, method), runs in grouped(rows_of("budgets"), "data", "method").items():
        if method == "dense":
            continue
        points = [(math.log(mean(one, "vs best dense")), mean(one, "accuracy")) for one in grouped(runs, "target").values()]
        found.setdefault(data, {})[method] = {
            speed: max(values) for speed in SPEEDS if (values := _heights_from(points, math.log(speed)))
        }  # fmt: skip
    return found


def _heights_from(points: Sequence[tuple[float, float]], place: float) -> list[float]:
    """Heights at `place` of the line through `points`, in their order, and of the points behind it; it may turn back."""
    heights = [y for x, y in points if x >= place]
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        if min(x, next_x) <= place <= max(x, next_x) and x != next_x:
            heights.append(y + (next_y - y) * (place - x) / (next_x - x))
    return heights


def equal_time_table() -> str:
    rows = []
    for data, methods in equal_time().items():
        for method, at in methods.items():
            rows.append((f"{data}: {method}", *(f"{100 * at[speed]:.1f}" if speed in at else "" for speed in SPEEDS)))
    return table(("accuracy where a step is at least …", *(f"{speed:g}× as fast" for speed in SPEEDS)), rows)


def equal_time_finding() -> str:
    """Which method has the best accuracy at each speed, or above it, that at least two reach."""
    lines = []
    for data, methods in equal_time().items():
        said = []
        for speed in SPEEDS:
            ranking = sorted(((at[speed], method) for method, at in methods.items() if speed in at), reverse=True)
            if len(ranking) > 1:
                (best, first), (next_best, second), *_ = ranking
                said.append(f"{first} at {speed:g}× ({100 * (best - next_best):.1f} points before {second})")
        lines.append(f"- {data}: " + ", ".join(said) + ".")
    return "\n".join(lines)


def steps_per_epoch(data: str) -> int:
    """Of the runs on `data` that no limit of time ended in the middle of an epoch; the batch is the same in all studies.

    Raises ValueError where there is no such run.
    """
    whole = [row for row in all_rows() if row["data"] == data and not row["max_seconds"]]
    (steps,) = {int(row["steps"]) // int(row["epochs_done"]) for row in whole}
    return steps


def networks_table() -> str:
    header = ("", "epochs", "trained", "a step, of a measured one", "accuracy, %", "speed of a step", "the same steps dense")
    rows = []
    for (model, method), runs in grouped(rows_of("cifar10"), "model", "method").items():
        (run,) = runs
        dense = int(run["steps"]) * float(run["dense_step_s"])
        epochs = int(run["steps"]) / steps_per_epoch(run["data"])
        name = f"{model}, {method}" + (f", {float(run['target']):.0%}" if method != "dense" else "")
        rows.append((
            name, f"{epochs:.1f}", f"{float(run['seconds']) / 60:.1f} min",
            f"{float(run['seconds']) / int(run['steps']) / float(run['step_s']):.2f}×",
            f"{100 * float(run['accuracy']):.1f}", f"{float(run['vs best dense']):.2f}×", f"{dense / 60:.1f} min",
        ))  # fmt: skip
    return table(header, rows)


def equal_minutes_table() -> str:
    """The paper's networks, all trained for the same time."""
    runs = {(run["model"], run["method"]): run for run in rows_of("cifar10")}
    (seconds,) = {run["max_seconds"] for run in runs.values()}
    (removed,) = {float(run["target"]) for run in runs.values() if run["method"] != "dense"}
    models, methods = list(dict.fromkeys(model for model, _ in runs)), list(dict.fromkeys(method for _, method in runs))
    named = [method if method == "dense" else f"{method}, {removed:.0%} of the weights removed" for method in methods]
    header = [f"after {float(seconds) / 60:g} minutes of training", *named]
    rows = []
    for model in models:
        each = [runs[model, method] for method in methods]
        rows.append([model, *(f"{100 * float(run['accuracy']):.1f} % ({int(run['steps'])} steps)" for run in each)])
    return table(header, rows)


def networks_setting() -> str:
    runs = rows_of("cifar10")
    (asked,) = {(run["data"], run["epochs"], run["max_seconds"]) for run in runs}
    data, epochs, seconds = asked
    return f"{data}; the schedule of {epochs} epochs compressed into {float(seconds) / 60:g} minutes of training a run; {machine_line(runs)}."


def machine_line(runs: Runs) -> str:
    run = runs[0]
    return f"{run['cpu']}, {run['threads']} threads, torch {run['torch']}"


def interrupted_account() -> str:
    """What happened to the run on two ranks, in sentences whose numbers are the file's."""
    found = json.loads((RESULTS / "interrupted.json").read_text(encoding="utf-8"))
    whole, parts = found["runs"]["undisturbed"], found["runs"]["interrupted"]
    images, scale = whole["images"], whole["scale"]
    lines = [
        f"{found['data']} as an ImageFolder, {images['train']:,} + {images['test']:,} images, {scale['ranks']} ranks, "
        f"{scale['images_per_step']} images a step, {human_bytes(scale['reduced_bytes'])} all-reduced a step for {scale['values']:,} kept "
        f"weights and {scale['dense_parameters']:,} dense parameters.",
        "",
    ]
    for stop in found["stops"]:
        place = stop["goes_on_after"]
        lines.append(f"- {stop['sent']} to {stop['to']}: torchrun ended with {stop['exit_code']}; "
                     f"the checkpoint left was of epoch {place['epochs'] + 1}, step {place['steps']}.")  # fmt: skip
    accuracies = " and ".join(f"{100 * run['training']['last_accuracy']:.2f} %" for run in (whole, parts))
    seconds = " and ".join(human_seconds(run["seconds_with_starts"]) for run in (whole, parts))
    differing = ", ".join(found["differing_parts"]) or "nothing"
    lines += ["", f"Undisturbed and interrupted: test accuracy {accuracies}, {seconds} with every start; what differs between the two last "
              f"checkpoints (weights, optimizer, random streams, history), bit for bit: {differing}."]  # fmt: skip
    return "\n".join(lines)


README_BLOCKS: Blocks = {"equal minutes": equal_minutes_table}
BLOCKS: Blocks = {
    "criteria setting": partial(setting, "criteria"),
    "criteria": criteria_table,
    "budgets setting": budgets_setting,
    "budgets": budgets_table,
    "equal time": equal_time_table,
    "equal time finding": equal_time_finding,
    "networks setting": networks_setting,
    "networks": networks_table,
    "interrupted": interrupted_account,
}


def plot(path: Path) -> None:
    """All studies but the one whose lines would have a single point each."""
    with plt.rc_context(STYLE):
        plot_accuracy([row for row in all_rows() if row["study"] != "cifar10"], path)


def main(arguments: list[str] | None = None) -> None:
    print_or_write("accuracy_page", __doc__, DOCUMENT, BLOCKS, plot, arguments, {README: README_BLOCKS})


if __name__ == "__main__":
    main()
