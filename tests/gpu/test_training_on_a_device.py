"""Whole runs on CUDA: precision, compiling and recorded graphs change nothing but how the steps are computed.

Compared is how far training has moved the weights, from the same start under the same masks; made-up data teach nothing, so losses
say little. On the CPU bfloat16 moves them 1 % of that way elsewhere, batch norms of half the batch 4 to 6 %, nine tenths of the learning
rate 10 %.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.run import start_run

pytestmark = pytest.mark.gpu

_SMALL = {
    "data": "fake", "image_size": 16, "train_limit": 128, "test_limit": 32, "batch_size": 32, "epochs": 2, "lr": 0.05, "sparsity": 0.7,
    "samples_per_class": 2, "timing_rounds": 0, "plan": "density", "tensorboard": "off", "device": "cuda", "augment": False,
    "model_args": {"stem": 8, "widths": [16], "depth": 1},
}  # fmt: skip
_STILL = {"lr": 1e-9}


class Runs:
    """Runs of one pattern from the same start, under the masks of the first."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder, self._shared, self._count = folder, {"pattern": pattern}, 0
        self._start = self._weights(_STILL)
        (masks,) = (folder / "0").glob("masks.*")
        self._shared["masks"] = str(masks)
        self.plain = self.moved({})

    def moved(self, changes: dict) -> torch.Tensor:
        """By how much each weight, in a run with ``changes``."""
        return self._weights(changes) - self._start

    def _weights(self, changes: dict) -> torch.Tensor:
        run = self._folder / str(self._count)
        self._count += 1
        start_run(TrainConfig.from_dict(_SMALL | self._shared | changes, "a test").validate(), run)
        model = load_checkpoint(run)["model"]
        names = sorted(name for name, tensor in model.items() if tensor.is_floating_point() and "running" not in name)
        return torch.cat([model[name].flatten().double() for name in names])


def apart(moved: torch.Tensor, plain: torch.Tensor) -> float:
    """The distance of two ends as a share of the way."""
    return float((moved - plain).norm() / plain.norm())


@pytest.fixture(scope="module", params=["unstructured", "block(16, 16)"])
def runs(request, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), request.param)


@pytest.mark.parametrize(
    "changes, most",
    [
        ({"device": "cpu"}, 0.03),
        ({"compile": True}, 0.03),
        ({"compile": True, "cuda_graphs": True}, 0.03),
        ({"accumulate": 2, "batch_size": 16}, 0.15),  # batch norms see other batches when a step is cut in two
        ({"precision": "bf16"}, 0.05),
        ({"precision": "fp16"}, 0.05),
    ],
    ids=["of the CPU", "compiled", "recorded", "accumulated", "bf16", "fp16"],
)
def test_a_run_is_the_run(runs: Runs, changes: dict, most: float) -> None:
    assert apart(runs.moved(changes), runs.plain) < most


def test_another_run_would_show(runs: Runs) -> None:
    assert apart(runs.moved({"lr": 0.9 * _SMALL["lr"]}), runs.plain) > 0.05


def test_a_checkpoint_needs_no_device(tmp_path: Path) -> None:
    start_run(TrainConfig.from_dict(_SMALL | {"epochs": 1}, "a test").validate(), tmp_path)
    state = load_checkpoint(tmp_path)
    assert all(tensor.device == torch.device("cpu") for tensor in state["model"].values())
