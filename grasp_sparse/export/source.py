"""The model of a run, rebuilt from a checkpoint alone, without data and without running code that the checkpoint names."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.train.checkpoint import load_checkpoint, read_checkpoint, require
from grasp_sparse.train.checkpoint_files import best_checkpoint, checkpoint_name
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.models import build_model
from grasp_sparse.train.resume import is_foreign, load_weights, misfits_named

_MOST_INPUT = 1 << 28  # numbers in one image: more than any has
# Of torchvision's factories: weights to begin with. They would be fetched, and overwritten at once.
_NOT_FOR_EXPORT = ("weights", "weights_backbone")


@dataclass(frozen=True)
class Source:
    """What is exported: the model as it was trained, in evaluation mode, and the plain dense one it came from.

    `shape` is (channels, height, width) of an image; `about` describes the run in plain values.
    """

    model: nn.Module
    plain: nn.Module
    shape: tuple[int, int, int]
    about: dict[str, Any]

    def images(self, count: int) -> Tensor:
        """Noise in the shape of `count` normalised images."""
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(0))


def read_source(run_dir: Path, which: str = "last", model: str | None = None) -> Source:
    """The model in `run_dir` at its `which` weights.

    `model`: a factory that the caller trusts. A checkpoint may come from anybody, so only this package's models and torchvision's
    are built because it says so. Raises UserError for a checkpoint that is missing, damaged, or asks for another factory.
    """
    state, where = _state(run_dir, which), f"the checkpoint in {run_dir}"
    config = TrainConfig.from_dict(state["config"], where).validate()
    if is_foreign(config.model) and model != config.model:
        raise UserError(
            f"Expected --model {config.model} on the command line too: {where} asks to import and call it, which may run any code; "
            "repeat it if you trust it"
        )
    data = state["data"]
    require(_describes_images(data), f"data in {where}", "num_classes, and shape as three sizes", data)
    args = {key: value for key, value in config.model_args.items() if key not in _NOT_FOR_EXPORT}
    trained, plain = (build_model(config.model, data["num_classes"], data["shape"][0], args).eval() for _ in range(2))
    with misfits_named(where, config.model):
        load_weights(trained, state, run_dir)
    epoch = state["position"].get("epoch")
    about = {"which": which, "epoch": epoch, "config": config.to_dict(), "data": data, "pruning": state["pruning"]}
    return Source(trained, plain, tuple(data["shape"]), about)


def _state(run_dir: Path, which: str) -> dict[str, Any]:
    """The checkpoint whose section "model" holds these weights."""
    state = load_checkpoint(run_dir)
    if which == "best":
        return read_checkpoint(_best(state["position"].get("history"), run_dir))
    if which == "ema":
        if state["ema"] is None:
            raise UserError(
                f"Expected a run with a moving average for --which ema, got one without in {run_dir}; train with --ema-decay"
            )
        state["model"] = {**state["model"], **state["ema"]}
    return state


def _best(history: Any, run_dir: Path) -> Path:
    """The checkpoint of the epoch with the best test accuracy. Raises UserError where none is there."""
    require(isinstance(history, list) and all(map(_is_row, history)), f"history in {run_dir}", "rows of numbers", history)
    if not history:
        raise UserError(f"Expected a finished epoch for --which best, got none yet in {run_dir}; --which last takes the newest checkpoint")
    best = best_checkpoint(run_dir, history)
    if best is None:
        raise UserError(f"Expected a checkpoint at the end of an epoch in {run_dir}, found none; --which last takes the newest")
    wanted = checkpoint_name(max(history, key=lambda row: row["test_accuracy"])["epoch"], 0)
    if best.name != wanted:
        warnings.warn(f"the checkpoint of the best epoch, {wanted}, is not there; taking {best.name}, the best one of those in {run_dir}", stacklevel=2)
    return best


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("epoch")) is int and type(row.get("test_accuracy")) is float


def _describes_images(data: dict[str, Any]) -> bool:
    shape, classes = data.get("shape"), data.get("num_classes")
    sizes = isinstance(shape, (list, tuple)) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
    return sizes and shape[0] * shape[1] * shape[2] <= _MOST_INPUT and type(classes) is int and classes > 0
