"""The commands and flags of `grasp-sparse`, and what --help says of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from grasp_sparse.export import SUFFIXES, WHICH
from grasp_sparse.patterns import USAGE
from grasp_sparse.train.config import TrainConfig, packaged_recipes

BAD_INPUT = 2  # exit code
_GROUPS = {
    "run": "run", "data": "data", "model": "model", "pruning": "pruning at initialization", "training": "training", "scale": "precision and several ranks (torchrun)",
}

_DESCRIPTION = "Prune networks at initialization (GraSP and others) and train them sparse with sparse kernels."
_TRAIN_EXAMPLES = """examples:
  grasp-sparse train --recipe demo                              what `make demo` runs
  grasp-sparse train --model resnet18 --sparsity 0.95 --epochs 20 --out runs/resnet18
  grasp-sparse train --recipe my.toml --lr 0.05                 a recipe of your own, one flag changed
  grasp-sparse train --resume runs/resnet18                     go on after Ctrl-C or a crash
  grasp-sparse train --resume auto --recipe my.toml             start, or go on: the same line in a cluster's restart loop
  grasp-sparse train --recipe demo --dense --out runs/dense     the same training, nothing pruned

A recipe is a TOML file whose keys are the flags above with _ for -, e.g.  batch_size = 128  or  model_args = {depth = 3}.
SIGTERM and SIGUSR1, as schedulers send them, save and exit with 0; Ctrl-C saves and exits with 130.
A run's folder gets checkpoint-*.pt, masks.safetensors, log.jsonl (a line an epoch), result.json, report.html, tensorboard/."""
_PRUNE_EXAMPLES = """examples:
  grasp-sparse prune --model resnet18 --sparsity 0.98 --out resnet18.safetensors
  grasp-sparse prune --recipe demo --criterion snip --out snip.safetensors
  grasp-sparse prune --model resnet18 --pattern 'block(32, 32)' --budget flops --out blocks.safetensors
  grasp-sparse prune --model resnet18 --budget time --speedup 4 --batch-size 64 --threads 2
  grasp-sparse train --recipe demo --masks snip.safetensors     train with them (same --seed, same initial weights)"""

_BENCH_EXAMPLES = """examples:
  grasp-sparse bench --model resnet50 --sparsity 0.95 --input 32x3x224x224
  grasp-sparse bench --model my_package.models:make_net --sparsity 0.98 --budget flops --input 128x3x32x32 --out mine.csv"""
_REPORT_EXAMPLES = """examples:
  grasp-sparse report benchmarks/results                plots of every CSV file there, beside them
  grasp-sparse report mine.csv --out plots
  grasp-sparse report runs/demo                         report.html of a training run, written again
  grasp-sparse report runs/*                            several runs compared: a table, and runs/comparison.html"""
_EXPORT_EXAMPLES = """examples:
  grasp-sparse export runs/demo --format dense          a state_dict for the plain model: torch.load(FILE, weights_only=True)
  grasp-sparse export runs/demo --format sparse         safetensors: gs.load_sparse(model, safetensors.torch.load_file(FILE))
  grasp-sparse export runs/demo --format onnx           the densified model, any batch size (needs onnx and onnxscript)"""


class _Parser(argparse.ArgumentParser):
    """Mistakes end in one line, like every other error, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"grasp-sparse: error: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="grasp-sparse", description=_DESCRIPTION)
    parser.add_argument("--debug", action="store_true", help="on an error, print the whole traceback")
    commands = parser.add_subparsers(dest="command", required=True, metavar="prune | train | bench | report | export | info")

    prune = commands.add_parser(
        "prune", usage="%(prog)s [--recipe NAME|FILE] [--out FILE] [flags below]",
        help="score a model at initialization and save which weights to keep", epilog=_PRUNE_EXAMPLES,
        description="Score every weight, keep the best, save the masks.", formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prune.add_argument("--out", default="masks.safetensors", metavar="FILE", help="masks, one bit a weight (default: %(default)s)")
    only_training = (
        "name", "dense", "masks", "plan", "max_density", "timing_rounds", "augment", "tensorboard", "log_every", "log_seconds",
    )  # fmt: skip
    of_a_step = ("batch_size", "memory_format")  # what --budget time measures
    _add_config_flags(prune, groups=("run", "data", "model", "pruning"), skip=only_training, also=of_a_step)

    train = commands.add_parser(
        "train", usage="%(prog)s [--recipe NAME|FILE] [--out DIR] [--resume auto] [flags below]   or   %(prog)s --resume DIR",
        help="prune, train sparse, compare with dense, report", epilog=_TRAIN_EXAMPLES,
        description="Prune at initialization, train only what is left, compare a step with the dense one, write a report.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is already in that folder")
    train.add_argument(
        "--resume", metavar="DIR|auto",
        help="go on with the run in this folder, exactly where it stopped; auto: with the one in --out, or start it",
    )
    _add_config_flags(train, groups=tuple(_GROUPS))

    _add_bench(commands)
    report = commands.add_parser(
        "report", help="a run's report, runs compared, or plots of benchmark results", epilog=_REPORT_EXAMPLES,
        description="Write the report of a training run again, compare several runs, or draw what the CSV files of benchmarks say.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("paths", nargs="+", metavar="PATH", help="CSV files, folders of them, or folders of training runs")
    report.add_argument("--out", metavar="DIR", help="folder for pages and plots (default: the run's own, above several runs, beside CSV files)")

    _add_export(commands)

    info = commands.add_parser(
        "info", help="versions, kernels, processor", description="What is installed, what was compiled and what will run."
    )
    info.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="a run's model as dense weights, sparse weights or ONNX", epilog=_EXPORT_EXAMPLES,
        description="Write the model of a run for other programs. Every file is read back and its outputs are compared with the run's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run", metavar="RUN", help="folder of a training run, finished or not")
    export.add_argument("--format", required=True, choices=tuple(SUFFIXES))
    export.add_argument("--out", metavar="FILE", help="default: RUN.pt, RUN.safetensors or RUN.onnx, beside the folder")
    export.add_argument("--which", choices=WHICH, default="last", help="which weights (default: %(default)s)")
    export.add_argument("--model", metavar="NAME", help="package.module:factory of the run, if it has one: a checkpoint alone is not obeyed")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="what pruning would bring to a model of yours, on this machine", epilog=_BENCH_EXAMPLES,
        description="Prune a model, then measure each layer and whole training steps, sparse against the fastest dense path. "
        "Inputs and targets are random numbers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("--model", required=True, metavar="NAME", help="vgg19, resnet32, any torchvision model, timm:name, or package.module:factory")
    bench.add_argument("--input", required=True, metavar="NxCxHxW", help="a batch, e.g. 32x3x224x224")
    bench.add_argument("--sparsity", type=float, metavar="SHARE", help="share removed (default: 0.95; with pattern nm 1 - N / M)")
    bench.add_argument("--pattern", default="unstructured", metavar="PATTERN", help=f"{USAGE} (default: %(default)s)")
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
