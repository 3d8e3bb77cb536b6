"""`grasp-sparse export`: write the model of a run in a format, read it back, compare."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp_sparse.export.onnx import check_packages, read_onnx, write_onnx
from grasp_sparse.export.source import Source, read_source
from grasp_sparse.export.weights import read_dense, read_sparse, write_dense, write_sparse
from grasp_sparse.files import move_over
from grasp_sparse.train.errors import UserError

_TOLERANCE = 1e-3  # of the largest logit: float32 through another library's kernels; a wrong weight is off by far more
_IMAGES = 3  # another number than a file was traced with


def export_run(run_dir: Path, form: str, path: Path, which: str = "last", model: str | None = None) -> float:
    """Write `path` and read it back; returns by how much its logits differ from the run's, as a share of the largest one.

    form: "dense", "sparse" or "onnx". which, model: see `read_source`. Raises UserError for what cannot be exported, and where
    what was written computes something else. Whatever goes wrong, a file that was at `path` before stays as it was.
    """
    if path.is_dir():
        raise UserError(f"Expected --out to be a file for the model, got the folder {path}; name a file in it")
    if form == "onnx":
        check_packages()
    source = read_source(run_dir, which, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    unread = path.with_name(f".{os.getpid()}.unread.{path.name}")  # the suffix last: readers go by it
    try:
        {"dense": write_dense, "sparse": write_sparse, "onnx": write_onnx}[form](source, unread)
        difference = _compare(source, _read(source, form, unread), path.name)
        move_over(unread, path)
    finally:
        unread.unlink(missing_ok=True)
    return difference


def _read(source: Source, form: str, path: Path) -> Callable[[Tensor], Tensor]:
    if form == "onnx":
        return read_onnx(path)
    read: nn.Module = (read_dense if form == "dense" else read_sparse)(source, path)
    return read.eval()


@torch.no_grad()
def _compare(source: Source, read: Callable[[Tensor], Tensor], name: str) -> float:
    images = source.images(_IMAGES)
    expected, got = source.model(images), read(images)
    difference = float("inf")
    if got.shape == expected.shape:
        difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= _TOLERANCE:  # also when it is not a number
        raise UserError(f"Expected {name} to compute what the run does, got logits {difference:.1e} apart; nothing was exported")
    return difference
