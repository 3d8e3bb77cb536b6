"""Whole runs on CUDA: precision, compiling and recorded graphs change nothing but how the steps are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.run import start_run

pytestmark = pytest.mark.gpu

_SMALL = {
    "data": "fake", "image_size": 16, "train_limit": 128, "test_limit": 32, "batch_size": 32, "epochs": 2, "lr": 0.05, "sparsity": 0.8,
    "samples_per_class": 2, "timing_rounds": 0, "plan": "density", "tensorboard": "off", "device": "cuda",
    "model_args": {"stem": 8, "widths": [16], "depth": 1},
}  # fmt: skip


def losses(folder: Path, **changes: object) -> list[float]:
    start_run(TrainConfig.from_dict(_SMALL | changes, "a test").validate(), folder)
    return [row["train_loss"] for row in load_checkpoint(folder)["position"]["history"]]


@pytest.mark.parametrize("pattern", ["unstructured", "block(16, 16)"])
@pytest.mark.parametrize(
    "changes",
    [{"device": "cpu"}, {"compile": True}, {"compile": True, "cuda_graphs": True}, {"accumulate": 2, "batch_size": 16}],
    ids=["of the CPU", "compiled", "recorded", "accumulated"],
)
def test_a_run_is_the_run(tmp_path: Path, pattern: str, changes: dict) -> None:
    plain = losses(tmp_path / "plain", pattern=pattern)
    # Batch norms see other batches when a step is cut in two.
    tolerance = 0.2 if "accumulate" in changes else 2e-2
    assert losses(tmp_path / "other", pattern=pattern, **changes) == pytest.approx(plain, rel=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns_the_same(tmp_path: Path, precision: str) -> None:
    assert losses(tmp_path / "low", precision=precision) == pytest.approx(losses(tmp_path / "plain"), rel=5e-2)


def test_a_checkpoint_needs_no_device(tmp_path: Path) -> None:
    start_run(TrainConfig.from_dict(_SMALL | {"epochs": 1}, "a test").validate(), tmp_path)
    state = load_checkpoint(tmp_path)
    assert all(tensor.device == torch.device("cpu") for tensor in state["model"].values())
