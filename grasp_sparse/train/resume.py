"""What a run that goes on may change, and what has to be asked for before a checkpoint of anybody is believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grasp_sparse.masks import MaskSet
from grasp_sparse.surgery import load_sparse, versioned
from grasp_sparse.train.checkpoint import require
from grasp_sparse.train.checkpoint_files import list_checkpoints
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.models import OWN_MODELS
from grasp_sparse.train.signals import Interrupted, Preempted

if TYPE_CHECKING:  # which imports torchvision: the command line asks here before it trains
    from grasp_sparse.train.data.sets import Data

# What may change when a run goes on: where things are, how often they are saved and shown, when to give up; not what is computed.
RESUMABLE = (
    "data_dir", "max_corrupt", "threads", "workers", "timing_rounds", "checkpoint_minutes", "keep_checkpoints", "tensorboard",
    "log_every", "log_seconds", "device",
)  # fmt: skip


def resumed_config(state: dict[str, Any], given: Mapping[str, Any], path: Path) -> TrainConfig:
    """The settings in the checkpoint `path`, which holds `state`, with those of the `given` values that may change.

    Raises UserError for given values that contradict the recipe the run was started with, and for a model whose factory is
    somebody's own code unless that very model is given: a checkpoint alone does not say which code to run.
    """
    recipe = TrainConfig.from_dict(state["recipe"], str(path))
    wanted = TrainConfig.from_dict(dict(given), "the command line")
    changed = [name for name in given if _contradicts(name, getattr(wanted, name), getattr(recipe, name))]
    if changed:
        named = ", ".join(f"{_flag(name)} {getattr(wanted, name)} (the run: {getattr(recipe, name)})" for name in changed)
        raise UserError(
            f"Expected the recipe of the run in {path.parent}, got another {named}; leave it out to go on with that run, "
            "or start a new one with another --out"
        )
    kept = {name: getattr(wanted, name) for name in given if name in RESUMABLE}
    config = TrainConfig.from_dict({**state["config"], **kept}, str(path)).validate()
    require(config.model == recipe.model, f"model in {path}", f"that of its recipe, {recipe.model}", config.model)
    if "model" not in given and is_foreign(config.model):
        raise UserError(
            f"{path} builds its model with {config.model}, code that is not part of this package; if you trust it, "
            f"go on with: {resume_command(config, path.parent)}"
        )
    return config


def _contradicts(name: str, wanted: Any, had: Any) -> bool:
    """Of a table only the keys that are named count: flags name some, and the recipe of the run may hold more.

    A run goes on with another GPU, not with a CPU instead of one.
    """
    if name == "device":
        return wanted.partition(":")[0] != had.partition(":")[0]
    if name in RESUMABLE:
        return False
    return not wanted.items() <= had.items() if isinstance(wanted, dict) and isinstance(had, dict) else wanted != had


def is_foreign(model: str) -> bool:
    """Whether that model is neither ours nor one of torchvision's."""
    if model in OWN_MODELS:
        return False
    from torchvision import models  # a second to import: only when asked for

    return model not in models.list_models(module=models)


def resume_command(config: TrainConfig, run_dir: Path) -> str:
    """What a person types to go on with a run."""
    return _resume_words(run_dir, config.model)


def _resume_words(run_dir: Path, model: str | None) -> str:
    named = f" --model {model}" if model is not None and is_foreign(model) else ""
    return f"grasp-sparse train --resume {run_dir}{named}"


def explained(stop: KeyboardInterrupt, run_dir: Path, model: str | None) -> KeyboardInterrupt:
    """What to raise for a `stop` before the first step or after the last: that the run in `run_dir` is saved, and how to go on.

    `stop` itself if it has words already, or no checkpoint is there. `model`: the one that the caller named, if any.
    """
    if str(stop) or not list_checkpoints(run_dir):
        return stop
    rest = f"saved, go on with: {_resume_words(run_dir, model)}"
    if isinstance(stop, Preempted):
        return Preempted(f"stopped by a signal; {rest}", saved=True)
    return Interrupted(f"interrupted; {rest}")


def check_data_of_run(data: Data, state: dict[str, Any], path: Path) -> None:
    """UserError unless `data` are those that the run in the checkpoint `path`, which holds `state`, was started with.

    With others every epoch would have another order, and accuracies before and after would not be of the same test images.
    """
    then, now = state["data"], data.describe()
    require(type(then.get("digest")) is str, f"digest of data in {path}", "that of its images", then.get("digest"))
    if then["digest"] == now["digest"]:
        return
    differing = [name for name in ("name", "train", "test", "num_classes", "shape") if then.get(name) != now[name]]
    counts = ", ".join(f"{name} {now[name]} (the run: {str(then.get(name)):.40})" for name in differing)
    raise UserError(
        f"Expected the data that the run in {path.parent} was started with, got others in {data.source}: "
        f"{counts or 'other file names or classes'}; name their folder "
        "with --data-dir, or start a new run with another --out"
    )


@contextlib.contextmanager
def misfits_named(where: Path | str, model: str) -> Iterator[None]:
    """Inside, only what the checkpoint `where` holds is taken over: what goes wrong does because it does not fit.

    But for a device that has no room, or is lost, which no checkpoint mends.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{where} does not fit model {model}: {error}") from error


def load_weights(model: nn.Module, state: dict[str, Any], where: Path | str) -> None:
    """Make the fresh `model` the one in the checkpoint `where`, which holds `state`.

    Raises UserError unless the weights it then keeps are those that its run chose; what torch raises where nothing fits.
    """
    found, weights = None, dict(state["model"])  # without what somebody may have hung on the mapping
    if state["pruning"] is None:
        model.load_state_dict(versioned(weights, model))
    else:
        load_sparse(model, weights)
        found = _kept(model, [layer["name"] for layer in state["pruning"]["layers"]]).digest()
    require(found == state["masks_digest"], f"masks_digest in {where}", f"that of its weights, {found}", state["masks_digest"])


def _kept(model: nn.Module, names: list[str]) -> MaskSet:
    masks = {}
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        masks[name] = layer.mask if hasattr(layer, "mask") else torch.ones_like(layer.weight, dtype=torch.bool)
    return MaskSet(masks)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
