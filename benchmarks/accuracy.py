"""Accuracy of networks that are sparse from the first step: criterion against criterion, budget against budget, the paper's nets.

    python -m benchmarks.accuracy --quick
    python -m benchmarks.accuracy --study criteria                      Fashion-MNIST, five criteria, 90 to 99 %, three seeds
    python -m benchmarks.accuracy --study budgets --cifar-dir cifar10   weights, multiply-adds or time: accuracy at equal step time
    python -m benchmarks.accuracy --study cifar10 --cifar-dir cifar10 --cifar-name 'CIFAR-10 (JPEG q75)'

Every run is `grasp-sparse train` with the fields of accuracy_studies.py; its folder stays in --runs, what it printed is in
out.txt there. After training its step is measured against the same network dense, in turns. Writes
benchmarks/results/accuracy.csv after every run, and prints mean and standard deviation over seeds at the end.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy_studies import SEEDS, STUDIES, Trial, quick
from benchmarks.runner import RESULTS, Results, measure_all, parser, run, settings_of, tell
from grasp_sparse.bench.results import Row, same
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import table
from grasp_sparse.train.run import start_run

KEY = ("study", "data", "model", "method", "target", "seed", "epochs", "max_seconds")
_GROUP = ("study", "data", "model", "method", "target")


def config_of(trial: Trial, seed: int, data_dir: str | None, threads: int) -> TrainConfig:
    values = trial.recipe | {"seed": seed, "data_dir": data_dir, "threads": threads, "name": f"{trial.method} {trial.target}"}
    return TrainConfig.from_dict(values, trial.name).validate()


def row_of(case: Row, result: Mapping[str, Any]) -> Row:
    """What a finished run found: accuracy, what was removed, steps taken, and the time of one beside the dense one."""
    training, pruning, timing = result["training"], result["pruning"], result["timing"]
    dense = timing["arms"][timing["best_dense"]]["median"]
    step = timing["arms"].get("sparse", timing["arms"][timing["best_dense"]])
    return case | {
        "accuracy": f"{training['last_accuracy']:.4f}", "best_accuracy": f"{training['best_accuracy']:.4f}",
        "weight_sparsity": f"{pruning['weight_sparsity']:.5f}" if pruning else "0",
        "flop_sparsity": f"{pruning['flop_sparsity']:.5f}" if pruning else "0",
        "epochs_done": training["epochs"], "steps": training["steps"], "seconds": f"{training['seconds']:.1f}",
        "step_s": f"{step['median']:.6g}", "step_q1_s": f"{step['q1']:.6g}", "step_q3_s": f"{step['q3']:.6g}",
        "dense_step_s": f"{dense:.6g}", "vs best dense": f"{dense / step['median']:.3f}",
    }  # fmt: skip


def summary(rows: Iterable[Mapping[str, str]]) -> str:
    """A line a method and target: accuracy over seeds, and how fast a step was."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    lines = [
        (*group, f"{len(runs)}", _mean_and_deviation([100 * float(run["accuracy"]) for run in runs]),
         f"{statistics.fmean(float(run['vs best dense']) for run in runs):.2f}x")
        for group, runs in groups.items()
    ]  # fmt: skip
    return table((*_GROUP, "seeds", "test accuracy, %", "step"), lines, right=(5, 6, 7))


def _mean_and_deviation(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def twin_row(trial: Trial, case: Row, trials: Iterable[Trial], rows: Iterable[Mapping[str, str]]) -> Row | None:
    """The row of `case`, as the machine it is on says, if another study has trained just that: the same recipe, the same seed."""
    names = {(other.study, other.method, other.target) for other in trials if other.recipe == trial.recipe and other != trial}
    same_in = case.keys() - {"study", "method", "target"}
    for row in rows:
        if (row["study"], row["method"], row["target"]) in names and same(row, case, same_in):
            return dict(row) | case
    return None


def _folder(trial: Trial, seed: int) -> str:
    words = (trial.recipe["data"], trial.recipe["model"], trial.method, trial.target, f"seed{seed}")
    return re.sub(r"[^\w.]+", "-", " ".join(words))


def main(arguments: list[str] | None = None) -> int:
    flags = parser("accuracy", __doc__)
    flags.add_argument("--study", nargs="+", choices=tuple(STUDIES), default=list(STUDIES), help="default: all")
    flags.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2, of study cifar10 only 0")
    flags.add_argument("--method", nargs="+", metavar="WORD", help="only methods with one of these words in their name")
    flags.add_argument("--data-dir", metavar="DIR", help="Fashion-MNIST (default: where it is found)")
    flags.add_argument("--cifar-dir", metavar="DIR", help="CIFAR-10; without it, what needs it is left out")
    flags.add_argument("--cifar-name", metavar="NAME", default="CIFAR-10", help="what the rows call it (default: %(default)s)")
    flags.add_argument("--max-seconds", type=float, metavar="S", help="of training, a run (default: the study's)")
    flags.add_argument("--runs", type=Path, default=Path("runs/accuracy"), metavar="DIR", help="default: %(default)s")
    flags.add_argument("--out", type=Path, help="CSV to write (default: accuracy.csv in benchmarks/results)")
    options = flags.parse_args(arguments)

    settings = settings_of(options)
    path = options.out or RESULTS / ("accuracy-quick.csv" if options.quick else "accuracy.csv")
    results = Results(path, settings, options.resume)
    studies = [quick] if options.quick else [STUDIES[name] for name in options.study]
    trials = [trial for study in studies for trial in study()]
    if options.method:
        trials = [trial for trial in trials if any(word in trial.method.split() for word in options.method)]
    if not options.cifar_dir and any(trial.on_cifar for trial in trials):
        tell("what trains on CIFAR-10 is left out; --cifar-dir DIR says where it is")
        trials = [trial for trial in trials if not trial.on_cifar]
    items = [(trial, seed) for trial in trials for seed in sorted(options.seeds or SEEDS[trial.study])]
    items.sort(key=lambda item: item[1])  # seed after seed: whatever ends it early leaves whole comparisons

    def run_one(item: tuple[Trial, int]) -> None:
        trial, seed = item
        if options.max_seconds:
            trial.recipe["max_seconds"] = options.max_seconds
        config = config_of(trial, seed, options.cifar_dir if trial.on_cifar else options.data_dir, options.threads)
        name = options.cifar_name if trial.on_cifar else config.data
        case = {
            "study": trial.study, "data": name, "model": config.model, "method": trial.method, "target": trial.target, "seed": seed,
            "epochs": config.epochs, "max_seconds": config.max_seconds,
        }  # fmt: skip
        if results.has([case]):
            return
        every = [other for study in STUDIES.values() for other in study()]
        if twin := twin_row(trial, case | settings, every, results.rows):
            results.add([twin], KEY)
            tell(f"{trial.name:60} seed {seed}  {float(twin['accuracy']):.2%}  the same run as in another study")
            return
        folder = options.runs / trial.study / _folder(trial, seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (folder / "out.txt").open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
                result = start_run(config, folder, overwrite=True)
        except (UserError, ValueError) as error:  # a speed-up out of reach, a loss that is no number
            tell(f"{trial.name}, seed {seed}: no row: {error}")
            return
        row = row_of(case, result)
        results.add([row], KEY)
        tell(f"{trial.name:60} seed {seed}  {float(row['accuracy']):.2%}  step {row['vs best dense']}x  {row['seconds']} s")

    measure_all(items, lambda item: f"{item[0].name}, seed {item[1]}", run_one)
    print(summary(results.rows))
    print(f"wrote {results.path}")
    return 0


if __name__ == "__main__":
    run(main)
