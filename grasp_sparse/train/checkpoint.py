"""What a checkpoint holds, and the checks without which nothing in one is believed: it may come from anybody.

A file is a zip archive of `torch.save` (plain dicts, lists, numbers, names and tensors) with a seal behind it. The seal finds
damage; against malice stands that only tensors and plain values are unpickled, that no tensor claims more memory than the file
has bytes, that there are no more values than that either, and that every section is checked before it is used.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_sparse.bits import is_dense
from grasp_sparse.files import DamagedFile, read_sealed, write_sealed
from grasp_sparse.train.checkpoint_files import best_checkpoint, checkpoint_name, drop_old_checkpoints, newest_good_checkpoint
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.streams import is_rng

FORMAT = 3
_SECTIONS: dict[str, tuple[type, ...]] = {
    "recipe": (dict,), "config": (dict,), "model": (dict,), "optimizer": (dict,), "scaler": (dict, type(None)),
    "ema": (dict, type(None)), "rng": (list,), "position": (dict,), "pruning": (dict, type(None)),
    "masks_digest": (str, type(None)), "environment": (dict,), "data": (dict,), "corrupt_files": (list,),
}  # fmt: skip
_IN_PRUNING = {"weight_sparsity": float, "flop_sparsity": float, "layers": list, "skipped": list}
_IN_LAYER = {
    "name": str, "shape": list, "kept": int, "total": int, "density": float, "flops_kept": int, "flops_total": int, "runs": str,
}  # fmt: skip
_IN_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_DEEPEST = 32  # containers within containers


def save_checkpoint(run_dir: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` (see _SECTIONS; the format number is added) under the name of its position; the file's path.

    Older checkpoints go, but for the newest `keep` and the one with the best test accuracy of those that are there; warns where
    they cannot be deleted. Raises OSError when it cannot be written; those that were there still are, then.
    """
    position = state["position"]
    path = run_dir / checkpoint_name(position["epoch"], position["step"])
    write_sealed(path, as_bytes({"format": FORMAT, **state, "model": _compact(state["model"])}))
    try:
        drop_old_checkpoints(run_dir, keep, best_checkpoint(run_dir, position["history"]))
    except OSError as error:
        warnings.warn(f"cannot delete older checkpoints ({error}), which take room; {path.name} is written", stacklevel=2)
    return path


def as_bytes(value: object) -> memoryview:
    """What `torch.save` writes; in memory, for torch's own writer turns a full disk into other errors and does not always survive it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def load_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The run's newest good checkpoint, on CPU, its sections of the right types. Runs no code from the file.

    Warns of damaged ones that it passes over. Raises UserError where none is good, or the newest good one is none of ours.
    """
    return read_checkpoint(newest_good_checkpoint(Path(run_dir)))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in that file; as `load_checkpoint`."""
    try:
        sealed = read_sealed(path)
        _check_archive(sealed, path)
        state = torch.load(io.BytesIO(sealed), map_location="cpu", weights_only=True)
    except (
        DamagedFile, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, TypeError,
        AttributeError, IndexError, AssertionError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read checkpoint {path}, it is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or type(state.get("format")) is not int or state["format"] != FORMAT:
        form = state.get("format") if isinstance(state, dict) else None
        found = f"format {form}" if type(form) is int and form.bit_length() <= 64 else f"none, in a {type(state).__name__}"
        raise UserError(f"Expected {path} to be a grasp_sparse checkpoint of format {FORMAT}, got {found}")
    state.setdefault("corrupt_files", [])  # they were not written once
    missing = _SECTIONS.keys() - state.keys()
    require(not missing, str(path), "a checkpoint with all of its sections", f"none named {', '.join(sorted(missing))}")
    _check_plain(state, len(sealed), path)
    _check_sections(state, path)
    return state


def _compact(model: dict[str, Any]) -> dict[str, Any]:
    """Without tensors that repeat or skip memory (a buffer somebody expanded): their values are the same written out."""
    loose = {name: value for name, value in model.items() if isinstance(value, Tensor) and not is_dense(value)}
    return {**model, **{name: value.contiguous() for name, value in loose.items()}}


def _check_archive(sealed: bytes, path: Path) -> None:
    """UserError for an archive that would unpack to more than it is: torch.save never compresses, nor writes bytes twice."""
    entries = zipfile.ZipFile(io.BytesIO(sealed)).infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    size = sum(entry.file_size for entry in entries)
    require(stored and size <= len(sealed), f"the archive {path}", "stored as it is", f"one of {len(sealed):,} bytes for {size:,}")


def _check_plain(state: dict[str, Any], most: int, path: Path) -> None:
    """UserError unless there are only plain values, at most that many, and CPU tensors that own each of their elements, once."""
    pending: list[tuple[object, int]] = [(state, 0)]
    values, seen = 1, set()  # how many are or were pending; tensors, which may stand in many places
    while pending:
        value, depth = pending.pop()
        require(depth <= _DEEPEST, str(path), f"at most {_DEEPEST} containers deep", "a deeper one")
        if type(value) in (dict, OrderedDict, list, tuple):
            # containers that hold one another many times over: a few bytes unfold to more than anybody can walk through
            values += len(value) * (1 + isinstance(value, dict))
            require(values <= most, str(path), f"a checkpoint of at most {most:,} values, one a byte", "more")
            items = (*value.keys(), *value.values()) if isinstance(value, dict) else value
            pending += [(item, depth + 1) for item in items]
        elif isinstance(value, Tensor):
            require(id(value) in seen or _is_ordinary(value), f"every tensor in {path}", "dense, on the CPU and with memory of its own", value)
            seen.add(id(value))
        else:
            known = value is None or type(value) in (str, float, bool) or (type(value) is int and value.bit_length() <= 64)
            require(known, f"every value in {path}", "plain", type(value).__name__)


def _is_ordinary(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    if tensor.is_neg() or tensor.is_conj() or tensor.requires_grad or not is_dense(tensor):
        return False
    # a bool of another byte than 0 and 1 counts as one for some operations and as more for others
    return tensor.dtype is not torch.bool or not tensor.numel() or int(tensor.view(torch.uint8).max()) <= 1


def _check_sections(state: dict[str, Any], path: Path) -> None:
    """UserError unless each section has its type; what depends on the run is checked where the run goes on."""
    for name, types in _SECTIONS.items():
        require(isinstance(state[name], types), f"{name} in {path}", types[0].__name__, state[name])
    for name in ("recipe", "config", "model"):
        require(all(type(key) is str for key in state[name]), f"the keys of {name} in {path}", "names", state[name])
    files = state["corrupt_files"]
    require(all(type(name) is str for name in files), f"corrupt_files in {path}", "names", files)
    rng = state["rng"]
    require(bool(rng) and all(map(is_rng, rng)), f"rng in {path}", "the states of each rank's random streams", rng)
    if (scaler := state["scaler"]) is not None:
        finite = all(type(value) in (int, float) and math.isfinite(value) for value in scaler.values())
        require(scaler.keys() == _IN_SCALER and finite, f"scaler in {path}", f"numbers for {', '.join(sorted(_IN_SCALER))}", scaler)
    if state["pruning"] is not None:
        _check_pruning(state["pruning"], path)


def _check_pruning(pruning: dict[str, Any], path: Path) -> None:
    def check(value: object, wanted: type, what: str) -> None:
        fits = type(value) is wanted and (wanted is not float or math.isfinite(value))
        require(fits, f"{what} of pruning in {path}", wanted.__name__, value)

    for name, wanted in _IN_PRUNING.items():
        check(pruning.get(name), wanted, name)
    for layer in pruning["layers"]:
        check(layer, dict, "every layer")
        for name, wanted in _IN_LAYER.items():
            check(layer.get(name), wanted, f"{name} of every layer")
        require(all(type(size) is int for size in layer["shape"]), f"shape of every layer in {path}", "integers", layer["shape"])
    for entry in pruning["skipped"]:
        named = type(entry) is list and len(entry) == 2 and all(type(text) is str for text in entry)
        require(named, f"skipped of pruning in {path}", "pairs of a module and a reason", entry)


def require(ok: bool, what: str, expected: str, got: object) -> None:
    """UserError about a part of a checkpoint unless `ok`."""
    if not ok:
        shown = f"{type(got).__name__} of shape {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise UserError(f"Expected {what} to be {expected}, got {shown}; the checkpoint is damaged, start a new run")
