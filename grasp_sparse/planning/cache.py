"""Measured times, kept for the process and, between processes, in one JSON file.

The file is ``grasp_sparse/layer-times.json`` in the user's cache folder (XDG_CACHE_HOME where it is set), or in the folder
that GRASP_SPARSE_CACHE names; GRASP_SPARSE_CACHE=0 (or empty) keeps nothing on the disk. A file that is damaged, of another
version or not to be written is done without.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import backends, nn

from grasp_sparse import _extension, ops
from grasp_sparse.allocator import allocator
from grasp_sparse.environment import cpu_model, instruction_limits, version_of
from grasp_sparse.files import write_atomically
from grasp_sparse.planning.inputs import LayerInput
from grasp_sparse.planning.measure import Times

_FORMAT = 2
_NEAR = 0.02  # times at a count of kept weights this near, as a share, are taken for those of this one
_MAX_KEYS = 4096  # a file that many have written into starts anew
_MAX_ROWS = 512  # of a key; the oldest go


class _Row(NamedTuple):
    """The times of a layer with so many weights: measured, or those of a count nearby, which then speak for this count alone."""

    kept: int
    times: Times
    measured: bool


_Store = dict[str, list[_Row]]
_memory: _Store = {}
_unsaved: set[str] = set()


def recall(key: str, kept: int) -> Times | None:
    """The times measured for ``key`` at ``kept`` weights or within 2 % of them, or None.

    What was said once is said again, whatever has been measured nearby since: a plan that was timed is the plan that is made.
    """
    if key not in _memory:
        _memory[key] = _read().get(key, [])
    rows = _memory[key]
    near = [(abs(row.kept - kept), row.times) for row in rows if row.kept == kept or row.measured and abs(row.kept - kept) <= _NEAR * kept]
    if not near:
        return None
    distance, times = min(near)
    if distance:
        _add(key, _Row(kept, times, measured=False))
    return times


def remember(key: str, kept: int, times: Times) -> None:
    """Keeps ``times`` for this process; :func:`save` keeps them for the next ones."""
    _add(key, _Row(kept, times, measured=True))


def replace(key: str, before: Times, times: Times) -> None:
    """``times`` in place of ``before``, for the count that was measured and those nearby that took them over."""
    _memory[key] = [row._replace(times=times) if row.times == before else row for row in _memory[key]]
    _unsaved.add(key)


def _add(key: str, row: _Row) -> None:
    rows = _memory.setdefault(key, [])
    rows.append(row)
    del rows[:-_MAX_ROWS]
    _unsaved.add(key)


def save() -> None:
    """Adds what this process has measured to the file."""
    path = cache_file()
    if path is None or not _unsaved:
        return
    store = _read()
    store = {**(store if len(store) < _MAX_KEYS else {}), **{key: _memory[key] for key in _unsaved}}
    data = json.dumps({"format": _FORMAT, "times": store}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(data))
    except OSError:
        pass  # a read-only or full disk: the next process measures again
    _unsaved.clear()


def cache_file() -> Path | None:
    """Where times are kept between processes; None when GRASP_SPARSE_CACHE says nowhere, or a home that does not exist."""
    folder = os.environ.get("GRASP_SPARSE_CACHE")
    if folder in ("", "0"):
        return None
    if folder is None:
        folder = _platform_folder() / "grasp_sparse"
    try:
        return Path(folder).expanduser() / "layer-times.json"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def _platform_folder() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    if sys.platform == "darwin":
        return Path("~/Library/Caches")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local"))
    return Path("~/.cache")


def layer_key(layer: nn.Module, given: LayerInput, pattern: str = "unstructured") -> str:
    """Everything the times of a layer depend on, but the number of its kept weights; ``pattern`` names blocks and their size."""
    device = layer.weight.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    facts = [
        *_machine(), allocator(), *_device(device), torch.get_num_threads(), autocast, pattern, type(layer).__name__,
        tuple(layer.weight.shape), layer.weight.stride(), layer.weight.dtype, layer.weight.requires_grad, layer.bias is not None, *given,
    ]  # fmt: skip
    if isinstance(layer, nn.Conv2d):
        facts += [layer.stride, layer.padding, layer.dilation, layer.padding_mode]
    return "|".join(map(str, facts))


@functools.cache
def _machine() -> tuple[str, ...]:
    """What holds for the whole process: processor, kernels, versions."""
    versions = str(torch.__version__), version_of("grasp_sparse")
    return (cpu_model(), instruction_limits(), _extension.status().isa, _kernels(), *versions)


def _device(device: torch.device) -> tuple:
    """A GPU by name; with what decides the precision of float32 products, and which algorithms torch's own kernels take."""
    if device.type != "cuda":
        onednn = backends.mkldnn
        return device.type, onednn.enabled, onednn.matmul.fp32_precision, onednn.conv.fp32_precision, onednn.deterministic
    cudnn = backends.cudnn
    precisions = backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
    return torch.cuda.get_device_name(device), _kernels("_cuda"), *_triton(), *precisions, cudnn.enabled, cudnn.benchmark, cudnn.deterministic


def _kernels(library: str = "_C") -> str:
    """Tells one build of a compiled library from another."""
    loaded = sys.modules.get(f"grasp_sparse.{library}")
    return str(os.stat(loaded.__file__).st_mtime_ns) if loaded is not None else "none"


@functools.cache
def _triton() -> tuple[str, str]:
    """Triton's version, and what tells one state of the kernels written in it from another."""
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((Path(ops.__file__).parent / "triton").glob("*.py"))))
    return version_of("triton"), sources.hexdigest()[:16]


def _read() -> _Store:
    """What the file holds; nothing if it is missing, damaged or foreign."""
    path = cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return {}
        return {
            key: [_Row(int(kept), _times(times), bool(measured)) for kept, times, measured in rows]
            for key, rows in content["times"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _times(seconds: list[float]) -> Times:
    times = Times(*map(float, seconds))
    if not all(0 < value < math.inf for value in times):
        raise ValueError("Expected positive times")
    return times
