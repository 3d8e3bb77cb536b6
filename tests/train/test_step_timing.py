"""The stop-watch: fair turns, true medians, models untouched; and bytes counted tensor by tensor."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_runs import NET, config_of
from torch import nn

from grasp_sparse.train import run
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.footprint import measure_footprint
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.timing import best_dense, measure_steps


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_measuring_changes_neither_model() -> None:
    dense, sparse = _model(), _model()
    before = copy.deepcopy((dense.state_dict(), sparse.state_dict()))
    times = measure_steps(TrainConfig(timing_rounds=2), dense, sparse, [_batch()])
    assert list(times) == ["dense nchw", "dense channels_last", "sparse"]
    assert best_dense(times) in ("dense nchw", "dense channels_last")
    for model, state in zip((dense, sparse), before):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bytes_are_those_of_the_tensors() -> None:
    weights = 8 * 3 * 9 + 8 + 8 + 8 * 4 + 4
    footprint = measure_footprint(TrainConfig(), _model(), _batch())
    assert (footprint.parameters, footprint.gradients, footprint.optimizer, footprint.indices) == (*[4 * weights] * 3, 0)
    assert footprint.total == 12 * weights


def test_without_momentum_the_optimizer_keeps_nothing() -> None:
    config = TrainConfig(momentum=0.0, nesterov=False)
    assert measure_footprint(config, _model(), _batch()).optimizer == 0


def test_index_buffers_are_counted_and_scalars_are_not() -> None:
    model = _model()
    model.register_buffer("col_indices", torch.zeros(100, dtype=torch.int32), persistent=False)
    model.register_buffer("mask", torch.zeros(50, dtype=torch.bool))
    assert measure_footprint(TrainConfig(), model, _batch()).indices == 450


def test_memory_is_told_without_timing_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = start_run(config_of(epochs=1, timing_rounds=2), tmp_path / "timed")
    result = start_run(config_of(epochs=1), tmp_path / "run")
    assert result["timing"] is None and result["memory"] == timed["memory"] and set(result["memory"]) == {"dense", "sparse"}
    monkeypatch.setattr(run, "beside_dense", lambda *_: pytest.fail("counted again"))
    assert resume_run(tmp_path / "run", NET)["memory"] == result["memory"]
