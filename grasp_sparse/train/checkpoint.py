"""Checkpoints: plain dicts and tensors, written so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from grasp_sparse.train.errors import UserError

FILE_NAME = "checkpoint.pt"
FORMAT = 1
_KEYS = {"format", "config", "model", "optimizer", "rng", "position", "pruning", "environment"}


def save_atomically(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary neighbour of `path`, flush it to the disk, then rename it over `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> Path:
    """Write `state` (see _KEYS; the format number is added) as the run's checkpoint; the file's path."""
    path = run_dir / FILE_NAME
    save_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    return path


def load_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The run's last checkpoint, on CPU. Runs no code from the file. Raises UserError for a missing or damaged one."""
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise UserError(f"Expected {run_dir} to hold a run with a {FILE_NAME}, found none; --resume takes the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read checkpoint {path}, it is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not _KEYS <= state.keys():
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"Expected {path} to be a grasp_sparse checkpoint of format {FORMAT}, got {found!r}")
    return state
