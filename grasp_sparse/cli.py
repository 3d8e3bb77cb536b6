"""`grasp-sparse prune | train | bench | report | export | info`: parses, calls, prints.

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
from typing import TYPE_CHECKING, Any

from grasp_sparse.allocator import keep_memory
from grasp_sparse.flags import BAD_INPUT, make_parser
from grasp_sparse.train.config import TrainConfig, read_recipe
from grasp_sparse.train.errors import UserError, one_line
from grasp_sparse.train.resume import explained
from grasp_sparse.train.signals import Preempted, preemption_raises

if TYPE_CHECKING:  # which imports torch.distributed: only who trains needs it
    from grasp_sparse.train.distributed import Ranks

OK, INTERRUPTED, TERMINATED = 0, 130, 143


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


def _given_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config fields that the recipe or the command line sets; a flag wins, of the arguments of model and criterion one by one."""
    recipe = read_recipe(arguments.recipe) if arguments.recipe else {}
    TrainConfig.from_dict(recipe, f"recipe {arguments.recipe}")
    if recipe.get("budget") == "time" and "sparsity" in recipe:
        raise UserError(f"recipe {arguments.recipe}: Expected speedup with budget 'time', got sparsity too; leave sparsity out")
    given = _given_flags(arguments)
    for chosen in ("model", "criterion"):
        of_recipe, args = recipe.get(chosen, getattr(TrainConfig, chosen)), f"{chosen}_args"
        if given.get(chosen, of_recipe) != of_recipe:
            recipe.pop(args, None)  # they belong to what the flag replaces
        elif args in recipe and args in given:
            given[args] = {**recipe[args], **given[args]}
    return {**recipe, **given}


def _config(arguments: argparse.Namespace) -> TrainConfig:
    config = TrainConfig.from_dict(_given_values(arguments), "the command line").validate()
    if config.budget == "time" and "sparsity" in _given_flags(arguments):
        raise UserError("Expected --speedup with budget time, got --sparsity; leave it out or choose another --budget")
    return config


def _prune(arguments: argparse.Namespace) -> int:
    from grasp_sparse.train.distributed import on_main, start_distributed, stop_distributed
    from grasp_sparse.train.run import prune_to_file

    start_distributed()
    prune_to_file(on_main(lambda: _config(arguments)), Path(arguments.out))
    stop_distributed()
    return OK


def _out(arguments: argparse.Namespace, config: TrainConfig) -> Path:
    """The folder of a run that is not named by --resume."""
    if arguments.out:
        return Path(arguments.out)
    if config.name in ("", "..") or Path(config.name).name != config.name:
        raise UserError(f"Expected --name to be that of one folder in runs, got {config.name!r}; name another folder with --out")
    return Path("runs") / config.name


def _train(arguments: argparse.Namespace) -> int:
    from grasp_sparse.bench.denormals import flush_denormals

    keep_memory()  # every step needs what the one before it needed
    flush_denormals()
    try:
        return _train_to_the_end(arguments)
    except KeyboardInterrupt as stop:
        if not arguments.resume:
            raise
        run_dir = _out(arguments, _config(arguments)) if arguments.resume == "auto" else Path(arguments.resume)
        raise explained(stop, run_dir, getattr(arguments, "model", None)) from None


def _train_to_the_end(arguments: argparse.Namespace) -> int:
    from grasp_sparse.train.checkpoint_files import has_run
    from grasp_sparse.train.distributed import on_main, start_distributed, stop_distributed
    from grasp_sparse.train.logging import say
    from grasp_sparse.train.run import continue_or_start_run, resume_run, start_run
    from grasp_sparse.train.summary import print_result, result_line

    ranks = start_distributed()
    if arguments.resume and arguments.overwrite:
        raise UserError("Expected --resume or --overwrite, got both: one goes on with the run that is there, the other deletes it")
    if arguments.resume and arguments.resume != "auto":
        refused = [f"--{flag}" for flag in ("recipe", "out") if getattr(arguments, flag)]
        if refused:
            raise UserError(f"--resume DIR goes on with the run's own recipe; leave out {', '.join(refused)}, or start a new run")
        run_dir = Path(arguments.resume)
        result = resume_run(run_dir, _given_flags(arguments))
    else:
        config, given = on_main(lambda: (_config(arguments), _given_values(arguments)))
        run_dir = _out(arguments, config)
        if ranks.is_main and not (arguments.resume and has_run(run_dir)):
            _advise(arguments, config, ranks)
        if arguments.resume:
            result = continue_or_start_run(config, given, run_dir)
        else:
            result = start_run(config, run_dir, arguments.overwrite)
    stop_distributed()
    if not ranks.is_main:
        return OK
    print_result(result, run_dir, _page_of(run_dir))
    say(result_line(result))
    return OK


def _advise(arguments: argparse.Namespace, config: TrainConfig, ranks: Ranks) -> None:
    """Warn of a recipe's learning rate on a step that the recipe does not have, unless the command line gives it."""
    from grasp_sparse.train.sharding import rate_advice

    if arguments.recipe and "lr" not in _given_flags(arguments):
        recipe = TrainConfig.from_dict(read_recipe(arguments.recipe), f"recipe {arguments.recipe}")
        if advice := rate_advice(config, recipe, ranks):
            warnings.warn(advice, stacklevel=2)


def _page_of(run_dir: Path) -> Path | None:
    """The page of a run that is finished. None, and a warning, where there is none: the run and its result stand without it."""
    again = f"grasp-sparse report {run_dir}"
    try:
        from grasp_sparse.report.run_page import write_report

        return write_report(run_dir)
    except KeyboardInterrupt as stop:
        message = f"interrupted; training is saved, write the report with: {again}"
        raise (Preempted(message, saved=True) if isinstance(stop, Preempted) else KeyboardInterrupt(message)) from None
    except Exception as error:  # matplotlib, fonts, a full disk
        warnings.warn(
            f"cannot write the report ({type(error).__name__}: {one_line(error)}); training is finished, to try again: {again}",
            stacklevel=2,
        )
        return None


def _bench(arguments: argparse.Namespace) -> int:
    from grasp_sparse.bench.command import BenchOptions, run_bench

    run_bench(BenchOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(BenchOptions)}))
    return OK


def _report(arguments: argparse.Namespace) -> int:
    from grasp_sparse.bench.plots import write_plots
    from grasp_sparse.report.comparison import COMPARISON_NAME, common_folder, comparison_table, write_comparison
    from grasp_sparse.report.run_page import write_report
    from grasp_sparse.report.runs import finished_runs, is_run
    from grasp_sparse.train.logging import say

    paths, out = [Path(path) for path in arguments.paths], None if arguments.out is None else Path(arguments.out)
    folders = [path for path in paths if is_run(path)]
    if len(folders) == 1:
        say(f"wrote {write_report(folders[0], out)}")
    elif folders:
        runs = finished_runs(folders)
        page = write_comparison(runs, out or common_folder(runs))
        say(comparison_table(runs))
        say(f"wrote {page}")
    for path in paths:
        # runs/* names the page of an earlier comparison too
        if path not in folders and not (folders and path.name == COMPARISON_NAME):
            for plot in write_plots(path, out):
                say(f"wrote {plot}")
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from grasp_sparse.export import SUFFIXES
    from grasp_sparse.export.command import export_run
    from grasp_sparse.report.style import human_bytes
    from grasp_sparse.train.logging import say

    run_dir = Path(arguments.run)
    beside = run_dir.resolve().name + SUFFIXES[arguments.format]
    path = Path(arguments.out) if arguments.out else run_dir.parent / beside
    difference = export_run(run_dir, arguments.format, path, arguments.which, arguments.model)
    size = human_bytes(path.stat().st_size)
    say(f"wrote {path} ({size}); read back, its logits differ from the run's by {difference:.1e} of the largest")
    return OK


def _info(arguments: argparse.Namespace) -> int:
    from grasp_sparse.environment import describe_environment, extension_status

    environment, kernels = describe_environment(), extension_status()
    if arguments.json:
        print(json.dumps({**environment, "extension": kernels}, indent=1, default=str))
        return OK
    rows = {**environment, "cuda": environment["cuda"] or "no device", "instruction_limits": environment["instruction_limits"] or "none"}
    if not kernels["loaded"]:
        rows["compiled"] = f"no: {kernels['reason']}"
    else:
        rows["compiled"] = ", ".join(f"{key}={value}" for key, value in kernels["built"].items()) or "yes"
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return OK


def _complain(error: Exception, line: str) -> None:
    """The error's one line, once: what failed on rank 0 for all is said there, what failed on another rank by that one."""
    from grasp_sparse.train.distributed import MainFailed, current_ranks

    ranks = current_ranks()
    if not isinstance(error, MainFailed):
        where = "" if ranks.size == 1 else f"rank {ranks.rank}: "
        print(f"grasp-sparse: error: {where}{line}", file=sys.stderr)


def _say_stopped(line: str) -> None:
    """What stopped all ranks is said by one."""
    from grasp_sparse.train.distributed import current_ranks

    if current_ranks().is_main:
        print(f"\ngrasp-sparse: {line}", file=sys.stderr)


def _check_kernels() -> None:
    """UserError, before any work, when the environment asks for kernels that this machine cannot run."""
    from grasp_sparse._extension import status

    if status().isa == "none":
        raise UserError(status().reason)


def _show_warning(message: Warning | str, category: type[Warning], *where: object) -> None:
    print(f"grasp-sparse: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, also for a run that a scheduler's signal stopped and that is saved; 2 for bad
    input, 130 after Ctrl-C, 143 for a scheduler's signal before anything was saved."""
    arguments = make_parser().parse_args(argv)
    commands = {"prune": _prune, "train": _train, "bench": _bench, "report": _report, "export": _export, "info": _info}
    command = commands[arguments.command]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if command not in (_info, _report):
                _check_kernels()
            with preemption_raises():
                return command(arguments)
    except Preempted as stop:
        _say_stopped(str(stop) or "stopped by a signal; nothing was saved")
        return OK if stop.saved else TERMINATED
    except KeyboardInterrupt as interrupt:
        _say_stopped(str(interrupt) or "interrupted; nothing was saved")
        return INTERRUPTED
    except (UserError, ValueError, NotImplementedError, OSError) as error:
        if arguments.debug:
            raise
        _complain(error, one_line(error))
        return BAD_INPUT
    except Exception as error:  # a bug, or something about the machine: a person still gets one line
        if arguments.debug:
            raise
        _complain(error, f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)")
        return BAD_INPUT
