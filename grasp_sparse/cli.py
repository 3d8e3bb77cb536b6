"""`grasp-sparse prune | train | bench | report | info`: parses, calls, prints.

Every mistake of the user ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from grasp_sparse.train.config import TrainConfig, packaged_recipes, read_recipe
from grasp_sparse.train.errors import UserError

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
_GROUPS = {
    "run": "run", "data": "data", "model": "model", "pruning": "pruning at initialization", "training": "training (SGD)",
}
# What may change when a run goes on: where things are, not what is computed.
_RESUMABLE = ("data_dir", "threads", "workers", "timing_rounds")

_DESCRIPTION = "Prune networks at initialization (GraSP and others) and train them sparse with sparse kernels."
_TRAIN_EXAMPLES = """examples:
  grasp-sparse train --recipe demo                              what `make demo` runs
  grasp-sparse train --model resnet18 --sparsity 0.95 --epochs 20 --out runs/resnet18
  grasp-sparse train --recipe my.toml --lr 0.05                 a recipe of your own, one flag changed
  grasp-sparse train --resume runs/resnet18                     go on after Ctrl-C or a crash
  grasp-sparse train --recipe demo --dense --out runs/dense     the same training, nothing pruned

A recipe is a TOML file whose keys are the flags above with _ for -, e.g.  batch_size = 128  or  model_args = {depth = 3}.
A run's folder gets checkpoint.pt, masks.safetensors, log.jsonl (a line an epoch), result.json, report.md and plots."""
_PRUNE_EXAMPLES = """examples:
  grasp-sparse prune --model resnet18 --sparsity 0.98 --out resnet18.safetensors
  grasp-sparse prune --recipe demo --criterion snip --out snip.safetensors
  grasp-sparse prune --model resnet18 --budget time --speedup 4 --batch-size 64 --threads 2
  grasp-sparse train --recipe demo --masks snip.safetensors     train with them (same --seed, same initial weights)"""

_BENCH_EXAMPLES = """examples:
  grasp-sparse bench --model resnet50 --sparsity 0.95 --input 32x3x224x224
  grasp-sparse bench --model my_package.models:make_net --sparsity 0.98 --budget flops --input 128x3x32x32 --out mine.csv"""
_REPORT_EXAMPLES = """examples:
  grasp-sparse report benchmarks/results                plots of every CSV file there, beside them
  grasp-sparse report mine.csv --out plots
  grasp-sparse report runs/demo                         report.md and plots of a training run, written again"""


class _Parser(argparse.ArgumentParser):
    """Mistakes end in one line, like every other error, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"grasp-sparse: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="grasp-sparse", description=_DESCRIPTION)
    parser.add_argument("--debug", action="store_true", help="on an error, print the whole traceback")
    commands = parser.add_subparsers(dest="command", required=True, metavar="prune | train | bench | report | info")

    prune = commands.add_parser(
        "prune", usage="%(prog)s [--recipe NAME|FILE] [--out FILE] [flags below]",
        help="score a model at initialization and save which weights to keep", epilog=_PRUNE_EXAMPLES,
        description="Score every weight, keep the best, save the masks.", formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prune.add_argument("--out", default="masks.safetensors", metavar="FILE", help="masks, one bit a weight (default: %(default)s)")
    only_training = ("name", "dense", "masks", "plan", "max_density", "timing_rounds", "augment")
    of_a_step = ("batch_size", "memory_format")  # what --budget time measures
    _add_config_flags(prune, groups=("run", "data", "model", "pruning"), skip=only_training, also=of_a_step)

    train = commands.add_parser(
        "train", usage="%(prog)s [--recipe NAME|FILE] [--out DIR] [flags below]   or   %(prog)s --resume DIR",
        help="prune, train sparse, compare with dense, report", epilog=_TRAIN_EXAMPLES,
        description="Prune at initialization, train only what is left, compare a step with the dense one, write a report.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is already in that folder")
    train.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, exactly where it stopped")
    _add_config_flags(train, groups=tuple(_GROUPS))

    _add_bench(commands)
    report = commands.add_parser(
        "report", help="plots of benchmark results, or a run's report", epilog=_REPORT_EXAMPLES,
        description="Draw what the CSV files of the benchmarks say, or write the report of a training run again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("paths", nargs="+", metavar="PATH", help="CSV files, folders of them, or folders of training runs")
    report.add_argument("--out", metavar="DIR", help="folder for the plots (default: beside each CSV file)")

    info = commands.add_parser(
        "info", help="versions, kernels, processor", description="What is installed, what was compiled and what will run."
    )
    info.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="what pruning would bring to a model of yours, on this machine", epilog=_BENCH_EXAMPLES,
        description="Prune a model, then measure each layer and whole training steps, sparse against the fastest dense path. "
        "Inputs and targets are random numbers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("--model", required=True, metavar="NAME", help="vgg19, resnet32, any torchvision model, or package.module:factory")
    bench.add_argument("--input", required=True, metavar="NxCxHxW", help="a batch, e.g. 32x3x224x224")
    bench.add_argument("--sparsity", type=float, default=0.95, metavar="SHARE", help="share removed (default: %(default)s)")
    bench.add_argument("--budget", choices=("weights", "flops"), default="weights", help="what sparsity counts (default: %(default)s)")
    bench.add_argument("--criterion", default="grasp", metavar="NAME", help="default: %(default)s")
    bench.add_argument("--num-classes", type=int, metavar="N", help="outputs of the model (default: its own)")
    bench.add_argument("--rounds", type=int, default=9, metavar="N", help="measured steps of each arm (default: %(default)s)")
    bench.add_argument("--seconds-per-layer", type=float, default=1.0, metavar="S", help="default: %(default)s")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--out", type=Path, metavar="FILE", help="write every figure to this CSV file too")


def _add_config_flags(
    parser: argparse.ArgumentParser, groups: Sequence[str], skip: Sequence[str] = (), also: Sequence[str] = ()
) -> None:
    """One flag per field of TrainConfig; a flag that is not given leaves no trace, so the recipe's value stays."""
    recipes = ", ".join(sorted(packaged_recipes()))
    parser.add_argument("--recipe", metavar="NAME|FILE", help=f"TOML file, or one that comes with the package: {recipes}")
    shown = (*groups, *{f.metadata["group"] for f in dataclasses.fields(TrainConfig) if f.name in also})
    sections = {name: parser.add_argument_group(_GROUPS[name]) for name in shown}
    for f in dataclasses.fields(TrainConfig):
        group, kind, choices = (f.metadata.get(key) for key in ("group", "type", "choices"))
        if (group not in groups and f.name not in also) or f.name in skip:
            continue
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        metavar = f.metadata.get("metavar") or (None if choices else kind.__name__.upper().replace("STR", "NAME"))
        common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            common["help"] += f" (default: {'on' if f.default else 'off'})"
            sections[group].add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif kind is dict:
            sections[group].add_argument(flag.removesuffix("s"), action="append", metavar=metavar, **common)
        elif kind is list:
            sections[group].add_argument(flag, action="append", metavar=metavar, **common)
        else:
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            if default is not None:
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                common["help"] += f" (default: {shown})"
            sections[group].add_argument(
                flag, type=kind, choices=choices, metavar=metavar, nargs=f.metadata.get("nargs"), **common
            )


def _given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config fields that stand on the command line."""
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {key: value for key, value in vars(arguments).items() if key in fields}
    for name in ("model_args", "criterion_args"):
        if name in given:
            given[name] = dict(_key_value(text) for text in given[name])
    return given


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    try:
        if not separator:
            raise tomllib.TOMLDecodeError("no '='")
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"Expected KEY=VALUE with a TOML value, got {text!r} ({error}); quote strings: 'act=\"relu\"'") from error


def _config(arguments: argparse.Namespace) -> TrainConfig:
    values, given = {}, _given_flags(arguments)
    if arguments.recipe:
        recipe = read_recipe(arguments.recipe)
        values = TrainConfig.from_dict(recipe, f"recipe {arguments.recipe}").to_dict()
        if recipe.get("budget") == "time" and "sparsity" in recipe:
            raise UserError(f"recipe {arguments.recipe}: Expected speedup with budget 'time', got sparsity too; leave sparsity out")
    config = TrainConfig.from_dict({**values, **given}, "the command line").validate()
    if config.budget == "time" and "sparsity" in given:
        raise UserError("Expected --speedup with budget time, got --sparsity; leave it out or choose another --budget")
    return config


def _prune(arguments: argparse.Namespace) -> int:
    from grasp_sparse.train.run import prune_to_file

    prune_to_file(_config(arguments), Path(arguments.out))
    return OK


def _train(arguments: argparse.Namespace) -> int:
    from grasp_sparse.report import write_report
    from grasp_sparse.train.logging import say
    from grasp_sparse.train.run import resume_run, start_run
    from grasp_sparse.train.summary import print_result, result_line

    if arguments.resume:
        given = _given_flags(arguments)
        refused = [f"--{key.replace('_', '-')}" for key in given if key not in _RESUMABLE]
        refused += [f"--{flag}" for flag in ("recipe", "out", "overwrite") if getattr(arguments, flag)]
        if refused:
            raise UserError(f"--resume goes on with the run's own recipe; leave out {', '.join(refused)}, or start a new run")
        run_dir = Path(arguments.resume)
        result = resume_run(run_dir, given)
    else:
        config = _config(arguments)
        run_dir = Path(arguments.out) if arguments.out else Path("runs") / config.name
        result = start_run(config, run_dir, arguments.overwrite)
    try:
        report = write_report(run_dir)
    except KeyboardInterrupt:
        message = f"interrupted; training is saved, write the report with: grasp-sparse train --resume {run_dir}"
        raise KeyboardInterrupt(message) from None
    print_result(result, run_dir, report)
    say(result_line(result))
    return OK


def _bench(arguments: argparse.Namespace) -> int:
    from grasp_sparse.bench.command import BenchOptions, run_bench

    run_bench(BenchOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(BenchOptions)}))
    return OK


def _report(arguments: argparse.Namespace) -> int:
    from grasp_sparse.bench.plots import write_plots
    from grasp_sparse.report import write_report
    from grasp_sparse.train.logging import say

    for path in map(Path, arguments.paths):
        if (path / "result.json").is_file():
            say(f"wrote {write_report(path)}")
            continue
        for plot in write_plots(path, None if arguments.out is None else Path(arguments.out)):
            say(f"wrote {plot}")
    return OK


def _info(arguments: argparse.Namespace) -> int:
    from grasp_sparse.environment import describe_environment, extension_status

    environment, kernels = describe_environment(), extension_status()
    if arguments.json:
        print(json.dumps({**environment, "extension": kernels}, indent=1, default=str))
        return OK
    rows = {**environment, "cuda": environment["cuda"] or "no device"}
    if not kernels["loaded"]:
        rows["compiled"] = f"no: {kernels['reason']}"
    else:
        rows["compiled"] = ", ".join(f"{key}={value}" for key, value in kernels["built"].items()) or "yes"
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return OK


def _one_line(error: BaseException) -> str:
    """The message on one line; of a worker process's traceback only the last line, which is the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):
        return lines[-1].partition("Error: ")[2] or lines[-1]
    return " ".join(lines)


def _check_kernels() -> None:
    """UserError, before any work, when the environment asks for kernels that this machine cannot run."""
    from grasp_sparse._extension import status

    if status().isa == "none":
        raise UserError(status().reason)


def _show_warning(message: Warning | str, category: type[Warning], *where: object) -> None:
    print(f"grasp-sparse: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    command = {"prune": _prune, "train": _train, "bench": _bench, "report": _report, "info": _info}[arguments.command]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if command not in (_info, _report):
                _check_kernels()
            return command(arguments)
    except KeyboardInterrupt as interrupt:
        print(f"\ngrasp-sparse: {str(interrupt) or 'interrupted; nothing was saved'}", file=sys.stderr)
        return INTERRUPTED
    except (UserError, ValueError, NotImplementedError, OSError) as error:
        if arguments.debug:
            raise
        print(f"grasp-sparse: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # a bug, or something about the machine: a person still gets one line
        if arguments.debug:
            raise
        line = f"unexpected {type(error).__name__}: {_one_line(error)} (--debug shows where)"
        print(f"grasp-sparse: error: {line}", file=sys.stderr)
        return BAD_INPUT
