"""A whole run: prune, train, compare with the dense step; from the beginning or from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grasp_sparse.costs import weight_costs
from grasp_sparse.files import FolderInUse, locked_folder, move_over, write_atomically
from grasp_sparse.masks import MaskSet
from grasp_sparse.train.beside_dense import beside_dense
from grasp_sparse.train.checkpoint import read_checkpoint, require
from grasp_sparse.train.checkpoint_files import (
    checkpoint_name, delete_checkpoints, delete_partial_files, has_run, list_checkpoints, newest_good_checkpoint, set_damaged_aside,
)
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data_parallel import parameter_counts, synchronize_norms
from grasp_sparse.train.distributed import Ranks, current_ranks, lost_ranks_named, on_main
from grasp_sparse.train.engine import Trainer
from grasp_sparse.environment import describe_environment
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import LOG_NAME, say
from grasp_sparse.train.position import Position
from grasp_sparse.train.prepare import (
    check_same_structure, data_and_model, density_table, example_input, masks_for, pruning_summary, sparsify_for_training,
)
from grasp_sparse.train.recorder import delete_events
from grasp_sparse.train.resume import check_data_of_run, load_weights, misfits_named, resume_command, resumed_config
from grasp_sparse.train.sharding import images_per_step, regrouped, step_in_words
from grasp_sparse.train.signals import Interrupted, Preempted

MASKS_NAME = "masks.safetensors"
RESULT_NAME = "result.json"
REPORT_NAME = "report.html"
_RUN_FILES = (MASKS_NAME, RESULT_NAME, LOG_NAME, REPORT_NAME)


def prune_to_file(config: TrainConfig, path: Path) -> None:
    """Score the model at initialization, print what is kept, save the masks."""
    if path.is_dir():
        raise UserError(f"Expected --out to be a file for the masks, got the folder {path}; name a file in it")
    on_main(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    config = dataclasses.replace(config, masks=None)
    data, model = data_and_model(config)
    masks = masks_for(config, model, data)
    costs = weight_costs(model, example_input(config, data), include=list(masks))
    on_main(lambda: masks.save(path))
    say(density_table(pruning_summary(masks, costs, {})))
    say(f"masks: {path}")


@lost_ranks_named()
def start_run(config: TrainConfig, run_dir: Path, overwrite: bool = False) -> dict[str, Any]:
    """Prune, train and compare from the beginning; returns what result.json holds.

    `overwrite` deletes the run that is there, but not before data, model and masks have proved good.
    """
    on_main(lambda: _make_folder(run_dir))
    with _sole_user(run_dir):
        on_main(lambda: _check_vacant(run_dir, overwrite))
        data, model = data_and_model(config)
        say(f"{config.model} on {data.name} ({len(data.train):,} + {len(data.test):,} images from {data.source}), "
            f"{step_in_words(config.batch_size, config.accumulate, current_ranks().size)}")
        masks = None if config.dense else masks_for(config, model, data)
        model = synchronize_norms(config, model)
        extra = {
            "recipe": config.to_dict(),
            "pruning": None if masks is None else sparsify_for_training(config, model, masks, data),
            "masks_digest": None if masks is None else masks.digest(),
            "environment": describe_environment(),
            "data": data.describe(),
        }
        trainer = Trainer(config, model, data, run_dir, extra)
        on_main(lambda: _begin_folder(run_dir, masks))
        return _finish(trainer)


@lost_ranks_named()
def resume_run(run_dir: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Go on with the run in `run_dir`. `given` recipe values repeat its own, or replace some that do not alter what is computed."""
    with _sole_user(run_dir):
        trainer, trained_as = _resumed_trainer(run_dir, given)
        if trained_as is None:
            on_main(lambda: _forget_result(run_dir))
        measured = None if trained_as is None else on_main(lambda: _measured_before(trainer))
        return _finish(trainer, trained_as, measured)


def _resumed_trainer(run_dir: Path, given: dict[str, Any]) -> tuple[Trainer, tuple[TrainConfig, Ranks] | None]:
    """A trainer that stands where the newest good checkpoint was written, which is held in memory no longer than this takes.

    With it, where nothing is left to train, the settings and the ranks that trained it.
    """
    path, state = on_main(lambda: _take_up(run_dir))
    config = resumed_config(state, given, path)
    kind = "nothing for a dense run" if config.dense else "a summary"
    require(config.dense == (state["pruning"] is None), f"pruning in {path}", kind, state["pruning"])
    ranks = current_ranks()
    recipe = TrainConfig.from_dict(state["recipe"], str(path))
    trained_as = config, Ranks(size=len(state["rng"]))
    config = regrouped(config, recipe, len(state["rng"]), ranks)
    data, model = data_and_model(config)
    check_data_of_run(data, state, path)
    model = synchronize_norms(config, model)
    with misfits_named(path, config.model):
        load_weights(model, state, path)
    check_same_structure(model)
    extra = {name: state[name] for name in ("recipe", "pruning", "masks_digest", "environment")} | {"data": data.describe()}
    trainer = Trainer(config, model, data, run_dir, extra)
    with misfits_named(path, config.model):
        trainer.restore(state)
    others = "" if ranks.size == len(state["rng"]) else f" as with {len(state['rng'])} before, not to the same bits"
    say(step_in_words(config.batch_size, config.accumulate, ranks.size) + others)
    if recipe.cuda_graphs and not config.cuda_graphs:
        say("without CUDA graphs: replayed for one micro-batch, a graph would overwrite the gradients of the one before")
    position = trainer.position
    say(f"{run_dir}: " + ("training is complete" if position.finished else
                          f"going on at epoch {position.epoch + 1}, step {position.step + 1}"))
    return trainer, trained_as if position.finished else None


def continue_or_start_run(config: TrainConfig, given: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Go on with the run in `run_dir` if one is there, else start one with `config`, which the `given` values led to."""
    return resume_run(run_dir, given) if on_main(lambda: has_run(run_dir)) else start_run(config, run_dir)


@contextlib.contextmanager
def _sole_user(folder: Path) -> Iterator[None]:
    """Inside, no other run, started or resumed, is in that folder. Raises UserError if one is."""

    def lock() -> None:
        try:
            held.enter_context(locked_folder(folder))
        except FolderInUse:
            raise UserError(f"another process is training the run in {folder}; wait for its end, or give another --out") from None
        except FileNotFoundError:
            raise UserError(f"Expected {folder} to hold a run, found no such folder; --resume takes the folder of a run") from None

    with contextlib.ExitStack() as held:
        on_main(lock)
        yield


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"Expected --out to be a folder for the run, got the file {folder}; name another")
    folder.mkdir(parents=True, exist_ok=True)


def _check_vacant(folder: Path, overwrite: bool) -> None:
    """UserError for a folder that holds a run, unless `overwrite`."""
    if has_run(folder) and not overwrite:
        raise UserError(
            f"{folder} already holds a run; --resume {folder} continues it, --overwrite deletes it, --out names another"
        )


def _begin_folder(folder: Path, masks: MaskSet | None) -> None:
    """Delete what a run writes, if there is a run: nothing in the folder may tell of another one. Write this one's masks.

    They are on the disk before any of the other run is deleted: where there is no room for them, the run that was there stays.
    """
    delete_partial_files(folder)
    fresh = folder / f".{MASKS_NAME}.partial"
    if masks is not None:
        masks.save(fresh)
    if has_run(folder):
        for name in _RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        delete_checkpoints(folder)
        delete_events(folder)
    if masks is not None:
        move_over(fresh, folder / MASKS_NAME)


def _forget_result(folder: Path) -> None:
    """Delete what tells of a run's end: it has not come, or its checkpoint was damaged later, and so many epochs are there no more."""
    for name in (RESULT_NAME, REPORT_NAME):
        (folder / name).unlink(missing_ok=True)


def _take_up(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest good checkpoint and what it holds; what a crash left damaged or half-written is out of the way afterwards."""
    path = newest_good_checkpoint(folder)
    state = read_checkpoint(path)
    set_damaged_aside(folder, path)
    delete_partial_files(folder)
    return path, state


def _finish(
    trainer: Trainer, trained_as: tuple[TrainConfig, Ranks] | None = None, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train to the end, measure the step against the dense one, write result.json and return what it holds.

    `trained_as`: the settings and ranks of a training that was complete before; `measured`: what was measured of its step then.
    """
    config = trainer.config
    resume = f"go on with: {resume_command(config, trainer.run_dir)}"
    try:
        position = trainer.fit()
        comparison = measured or on_main(lambda: beside_dense(trainer))
    except KeyboardInterrupt as stop:
        saved = _is_complete(trainer) or isinstance(stop, Interrupted) or (isinstance(stop, Preempted) and stop.saved)
        if not saved and not list_checkpoints(trainer.run_dir):
            raise
        # not saved: a second, impatient Ctrl-C
        state = "saved" if saved else "the last checkpoint stands"
        if isinstance(stop, Preempted):
            raise Preempted(f"stopped by a signal; {state}, {resume}", saved=True) from None
        raise (Interrupted if saved else KeyboardInterrupt)(f"interrupted; {state}, {resume}") from None
    config, ranks = trained_as or (config, trainer.ranks)
    result = {
        "config": config.to_dict(),
        "environment": trainer.extra["environment"],
        "data": trainer.extra["data"],
        "pruning": trainer.extra["pruning"],
        "training": _training_summary(position),
        "scale": _scale(trainer, config, ranks),
        "corrupt_files": sorted(trainer.data.corrupt.names),
        **comparison,
    }
    on_main(lambda: _write_result(trainer.run_dir / RESULT_NAME, result, resume))
    return result


def _write_result(path: Path, result: dict[str, Any], resume: str) -> None:
    text = json.dumps(result, indent=1).encode()
    try:
        write_atomically(path, lambda file: file.write(text))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); training is complete and saved, make room, then {resume}") from error


def _is_complete(trainer: Trainer) -> bool:
    """Whether the end of training is on the disk; only rank 0 can tell, the others take it for granted."""
    position = trainer.position
    last = trainer.run_dir / checkpoint_name(position.epoch, position.step)
    return position.finished and (not trainer.ranks.is_main or last.is_file())


def _training_summary(position: Position) -> dict[str, Any]:
    best = max(position.history, key=lambda row: row["test_accuracy"])
    return {
        "epochs": len(position.history),
        "steps": sum(row["steps"] for row in position.history),
        "seconds": position.seconds,
        "last_accuracy": position.history[-1]["test_accuracy"],
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
    }


def _scale(trainer: Trainer, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """On how many ranks, and what crossed between them a step: measured bytes beside the numbers they should hold."""
    kept, dense = parameter_counts(trainer.model)
    return {
        "ranks": ranks.size,
        "images_per_step": images_per_step(config, ranks),
        "reduced_bytes": trainer.position.history[-1]["reduced_bytes"],
        "values": kept,
        "dense_parameters": dense,
    }


def _measured_before(trainer: Trainer) -> dict[str, Any] | None:
    """What result.json says was measured of the steps of this complete run; None where as much as is asked for now was not."""
    asked = [trainer.config.timing_rounds, trainer.config.threads, trainer.config.device]
    try:
        result = json.loads((trainer.run_dir / RESULT_NAME).read_text(encoding="utf-8"))
        measured = {name: result[name] for name in ("timing", "memory")}
        if result["training"] != _training_summary(trainer.position):
            return None
        if [result["config"][name] for name in ("timing_rounds", "threads", "device")] != asked:
            return None
        if not measured["memory"] or bool(measured["timing"]) != bool(asked[0]):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if asked[0]:
        say("its steps were measured before; another --timing-rounds, --threads or --device measures them again")
    return measured
