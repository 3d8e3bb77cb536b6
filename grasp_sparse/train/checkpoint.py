"""Checkpoints: plain dicts and tensors, written so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_sparse.files import write_atomically
from grasp_sparse.train.errors import UserError

FILE_NAME = "checkpoint.pt"
FORMAT = 2
_SECTIONS: dict[str, tuple[type, ...]] = {
    "config": (dict,), "model": (dict,), "optimizer": (dict,), "scaler": (dict, type(None)), "ema": (dict, type(None)), "rng": (list,), "position": (dict,),
    "pruning": (dict, type(None)), "environment": (dict,),
}  # fmt: skip
_IN_PRUNING = {"weight_sparsity": float, "flop_sparsity": float, "layers": list, "skipped": list}


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> Path:
    """Write `state` (see _SECTIONS; the format number is added) as the run's checkpoint; the file's path."""
    path = run_dir / FILE_NAME
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    return path


def load_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The run's last checkpoint, on CPU, its sections of the right types. Runs no code from the file.

    Raises UserError for a missing or damaged one.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise UserError(f"Expected {run_dir} to hold a run with a {FILE_NAME}, found none; --resume takes the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read checkpoint {path}, it is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not _SECTIONS.keys() <= state.keys():
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"Expected {path} to be a grasp_sparse checkpoint of format {FORMAT}, got {found!r}")
    _check_sections(state, path)
    return state


def _check_sections(state: dict[str, Any], path: Path) -> None:
    """UserError unless each section has its type; what depends on the run is checked where the run goes on."""
    for name, types in _SECTIONS.items():
        require(isinstance(state[name], types), f"{name} in {path}", types[0].__name__, state[name])
    for name in ("config", "model"):
        require(all(type(key) is str for key in state[name]), f"the keys of {name} in {path}", "names", state[name])
    rng = state["rng"]
    require(bool(rng) and all(map(_is_rng, rng)), f"rng in {path}", "the states of each rank's random streams", rng)
    for name, wanted in _IN_PRUNING.items() if state["pruning"] is not None else ():
        value = state["pruning"].get(name)
        require(type(value) is wanted, f"{name} of pruning in {path}", wanted.__name__, value)


def rng_state() -> dict[str, Any]:
    """This process's random streams, as an entry of the section rng."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}


def restore_rng(state: dict[str, Any]) -> None:
    """Go on drawing where `rng_state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_rng(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"torch", "cuda"}:
        return False
    return _is_rng_state(entry["torch"]) and (entry["cuda"] is None or _is_rng_state(entry["cuda"]))


def _is_rng_state(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.uint8 and value.dim() == 1


def require(ok: bool, what: str, expected: str, got: object) -> None:
    """UserError about a part of a checkpoint unless `ok`."""
    if not ok:
        shown = f"{type(got).__name__} of shape {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise UserError(f"Expected {what} to be {expected}, got {shown}; the checkpoint is damaged, start a new run")
