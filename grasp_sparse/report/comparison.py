"""Several runs side by side: one table, their test curves over each other, and means over runs that differ in the seed alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import pyplot as plt

from grasp_sparse.report.curves import QUANTITIES, plot_curves
from grasp_sparse.report.figures import inline_svg
from grasp_sparse.report.pages import write_page
from grasp_sparse.report.recipe import toml_value
from grasp_sparse.report.runs import SPARSE, Run, in_words
from grasp_sparse.report.style import SERIES, STYLE, human_bytes, human_seconds
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import human_duration, table

COMPARISON_NAME = "comparison.html"
HEADER = (
    "run", "model", "data", "criterion", "budget", "settings", "removed", "last", "best", "dense step", "sparse step", "speed", "bytes kept",
    "all-reduced", "training",
)  # fmt: skip
_DESCRIPTIVE = range(1, 7)  # columns of HEADER that say what was done; not repeated in every row where all runs agree
GROUP_HEADER = ("runs", "criterion", "budget", "settings", "removed", "seeds", "last: mean ± std", "best: mean ± std", "speed")
# What tells runs of one experiment apart without changing what is computed.
_APART = (
    "name", "data_dir", "threads", "workers", "timing_rounds", "checkpoint_minutes", "keep_checkpoints", "tensorboard", "log_every",
    "log_seconds",
)  # fmt: skip
_IN_COLUMNS = ("model", "data", "dense", "criterion", "budget", "pattern", "scope", "sparsity")  # of HEADER, "settings" aside


def write_comparison(runs: Sequence[Run], folder: Path) -> Path:
    """Write comparison.html of at least two different runs into `folder`; returns its path."""
    named = labelled(runs)
    with plt.rc_context(STYLE):
        histories = {label: run.rows for label, run in named.items()}
        curves = [inline_svg(plot_curves(histories, what), what, f"Test {what} of every run by epoch") for what in QUANTITIES]
    alike, header, rows = comparison_rows(named)
    values = {
        "title": f"{len(runs)} runs compared", "curves": curves, "alike": alike, "header": header, "rows": rows,
        "colours": [SERIES[number % len(SERIES)] for number in range(len(named))], "group_header": GROUP_HEADER,
        "groups": seed_groups(named),
        "machines": sorted({in_words(run.timed_in) for run in runs}), "recipes": _differences(named),
    }  # fmt: skip
    return write_page("comparison.html", values, folder / COMPARISON_NAME)


def comparison_table(runs: Sequence[Run]) -> str:
    """The same table for a terminal."""
    alike, header, rows = comparison_rows(labelled(runs))
    first = "".join(f"{name} {value}   " for name, value in alike.items()).rstrip()
    words = sum(HEADER[column] in header for column in (0, *_DESCRIPTIVE[:-1]))
    return f"{first}\n\n{table(header, rows, right=range(words, len(header)))}".lstrip()


def comparison_rows(named: dict[str, Run]) -> tuple[dict[str, str], list[str], list[list[str]]]:
    """What all runs have in common, then the header and a row a run of the rest."""
    settings = telling_settings(named)
    rows = [table_row(label, run, settings[label]) for label, run in named.items()]
    same = [column for column in _DESCRIPTIVE if len({row[column] for row in rows}) == 1]
    alike = {HEADER[column]: rows[0][column] for column in same if rows[0][column]}

    def rest(row: Sequence[str]) -> list[str]:
        return [cell for column, cell in enumerate(row) if column not in same]

    return alike, rest(HEADER), [rest(row) for row in rows]


def labelled(runs: Sequence[Run]) -> dict[str, Run]:
    """Each run under its name, or under its folder where two have the same. Raises UserError for one run given twice."""
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise UserError(f"Expected different runs to compare, got {twice} more than once")
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return dict(zip(names, runs, strict=True))
    above = common_folder(runs)
    return {os.path.relpath(folder, above): run for folder, run in zip(folders, runs, strict=True)}


def common_folder(runs: Sequence[Run]) -> Path:
    """The folder that holds them all, however deep."""
    return Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))


def table_row(label: str, run: Run, settings: str) -> list[str]:
    """What HEADER names; what a run has not is a dash. `settings`: see `telling_settings`."""
    training, pruning = run.result["training"], run.pruning
    dense, sparse = next((arm for name, arm in run.steps.items() if name != SPARSE), None), run.steps.get(SPARSE)
    arm = SPARSE if pruning else "dense"
    return [
        label, run.config["model"], run.result["data"]["name"], *_made_by(run), settings,
        f"{pruning['weight_sparsity']:.2%}" if pruning else "–",
        f"{training['last_accuracy']:.2%}", f"{training['best_accuracy']:.2%}",
        human_seconds(dense["median"]) if dense else "–", human_seconds(sparse["median"]) if sparse else "–",
        f"{run.speedup:.2f}×" if run.speedup else "–",
        human_bytes(sum(run.memory[arm].values())) if run.memory else "–", human_bytes(run.traffic[arm]) if run.memory else "–",
        human_duration(training["seconds"]),
    ]  # fmt: skip


def telling_settings(named: dict[str, Run], passed_over: Sequence[str] = ()) -> dict[str, str]:
    """By run, the settings that tell it from the others and that no other column of the table shows; "" where there are none."""
    settings = {label: _settings(run) for label, run in named.items()}
    names = dict.fromkeys(name for found in settings.values() for name in found if name not in (*_IN_COLUMNS, *passed_over))
    telling = [name for name in names if len({json.dumps(found.get(name)) for found in settings.values()}) > 1]
    return {label: ", ".join(_said(name, found.get(name)) for name in telling) for label, found in settings.items()}


def _settings(run: Run) -> dict[str, Any]:
    """All that decides what a run computes."""
    return {name: value for name, value in run.config.items() if name not in _APART} | {"ranks": run.ranks}


def _said(name: str, value: Any) -> str:
    return f"{name} {value if isinstance(value, str) else toml_value(value)}"


def seed_groups(named: dict[str, Run]) -> list[list[str]]:
    """A row for every two or more runs whose recipes differ in the seed alone: mean and sample standard deviation."""
    alike: dict[str, list[tuple[str, Run]]] = {}
    telling = telling_settings(named, passed_over=("seed",))
    for label, run in named.items():
        settings = {name: value for name, value in _settings(run).items() if name != "seed"}
        alike.setdefault(json.dumps(settings, sort_keys=True), []).append((label, run))
    rows = []
    for members in alike.values():
        seeds = [run.config.get("seed") for _, run in members]
        if len(members) < 2 or len(set(seeds)) < len(seeds):
            continue
        runs = [run for _, run in members]
        removed = [run.pruning["weight_sparsity"] for run in runs if run.pruning]
        speeds = [run.speedup for run in runs if run.speedup]
        rows.append([
            ", ".join(label for label, _ in members), *_made_by(runs[0]), telling[members[0][0]] or "–", f"{fmean(removed):.2%}" if removed else "–",
            " ".join(map(str, seeds)), *(_spread([run.result["training"][key] for run in runs]) for key in ("last_accuracy", "best_accuracy")),
            f"{fmean(speeds):.2f}×" if len(speeds) == len(runs) else "–",
        ])  # fmt: skip
    return rows


def _made_by(run: Run) -> tuple[str, str]:
    """Criterion and budget in words; nothing of a dense run."""
    if not run.pruning:
        return "dense", "–"
    pattern, scope = run.config.get("pattern", "unstructured"), run.config.get("scope", "global")
    extra = [word for word, usual in ((pattern, "unstructured"), (scope, "global")) if word != usual]
    return ", ".join(["given masks" if run.config.get("masks") else run.config["criterion"], *extra]), run.config["budget"]


def _spread(shares: Sequence[float]) -> str:
    return f"{fmean(shares):.2%} ± {100 * stdev(shares):.2f}"


def _differences(named: dict[str, Run]) -> dict[str, Any]:
    """The settings in which the runs differ: `header` and `rows`, a row a setting."""
    settings = [{**run.config, "ranks": run.ranks} for run in named.values()]
    rows = []
    for key in dict.fromkeys(key for found in settings for key in found if key != "name"):
        values = [json.dumps(found.get(key)) for found in settings]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return {"header": ("setting", *named), "rows": rows}
