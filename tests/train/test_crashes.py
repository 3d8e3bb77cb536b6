"""Whatever ends a run, kill -9 included, another start with --resume auto goes on, and its end has the bits of a run left alone."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_runs
import pytest
import several_ranks
import torch

from grasp_sparse import files
from grasp_sparse.train.checkpoint import load_checkpoint, save_checkpoint
from grasp_sparse.train.checkpoint_files import list_checkpoints
from grasp_sparse.train.streams import rng_state

_SEEDS = 20


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("crashes")
    done = subprocess.run(
        [sys.executable, forked_runs.__file__, str(folder), str(_SEEDS)], env={**os.environ, **several_ranks.python_path()},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "happened.json").read_text())


@pytest.mark.parametrize("seed", range(_SEEDS))
def test_killed_at_random_moments_and_resumed_equals_undisturbed(happened: dict[str, Any], seed: int) -> None:
    run = happened["seeds"][seed]
    assert run["last"] == 0, run["said"]
    assert all(isinstance(position, list) for position in run["stood"]), run["stood"]  # nothing damaged at any moment
    assert run["stood"][0] <= run["stood"][1]
    assert all(stood >= saved for stood, saved in zip(run["stood"], run["saved"], strict=True)), run  # nothing lost that was saved
    assert run["differing"] == [] and run["left"] == []


def test_the_random_moments_fall_into_training(happened: dict[str, Any]) -> None:
    """Otherwise the test above would say little: most kills hit a run that has begun and not ended."""
    stood = [tuple(position) for run in happened["seeds"] for position in run["stood"]]
    inside = {position for position in stood if (0, 0) < position < (3, 0)}
    assert len(inside) >= 5 and any(step for _, step in inside)
    assert sum(code == forked_runs.TOOK_TOO_LONG for run in happened["seeds"] for code in run["codes"]) >= _SEEDS


def test_a_signal_to_one_rank_stops_all_at_one_step_saved_within_seconds(happened: dict[str, Any]) -> None:
    stopped = happened["several"]["stopped"]
    assert stopped["codes"] == [0, 0], stopped["said"]
    assert stopped["seconds"] < 10 and (0, 0) < tuple(stopped["stands"]) < (8, 0)
    told = ["stopped by a signal; saved, go on with: grasp-sparse train --resume" in said for said in stopped["said"]]
    assert told == [True, False]


def test_a_rank_that_dies_stops_the_others_with_the_reason(happened: dict[str, Any]) -> None:
    died = happened["several"]["died"]
    assert died["codes"] == [2, -signal.SIGKILL], died["said"]
    assert died["seconds"] < 20
    error = died["said"][0].strip().splitlines()[-1]
    assert "another rank of this run is gone" in error and "--resume auto" in error
    assert tuple(died["stands"]) >= tuple(happened["several"]["stopped"]["stands"])


def test_ranks_started_again_end_with_the_bits_of_ranks_left_alone(happened: dict[str, Any]) -> None:
    several = happened["several"]
    assert several["last"] == several["whole"] == [0, 0]
    assert several["differing"] == []


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_is_explained_once(happened: dict[str, Any]) -> None:
    several = happened["several"]
    assert several["diverged"] == [2, 2], several["diverged said"]
    errors = [line for said in several["diverged said"] for line in said.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "the loss is nan at step 2 of epoch 2, rank 1" in errors[0]
    assert several["diverged stands"] == [1, 1]


_STATE = {
    "recipe": {}, "config": {}, "model": {"w": torch.arange(1000.0)}, "optimizer": {}, "scaler": None, "ema": None,
    "rng": [rng_state()], "pruning": None, "masks_digest": None, "environment": {}, "data": {},
}  # fmt: skip


def _killed_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process kill itself before its operation of that number on files; a write is cut in the middle."""
    left = [operation]

    def counted(real: Callable) -> Callable:
        def call(*arguments, **others):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **others)

        return call

    class Cut(io.FileIO):
        def write(self, data) -> int:
            left[0] -= 1
            if left[0] < 0:
                super().write(memoryview(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    for name in ("fsync", "replace", "open", "close"):
        monkeypatch.setattr(files.os, name, counted(getattr(os, name)))
    monkeypatch.setattr(files, "open", lambda path, mode: counted(Cut)(path, mode), raising=False)
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


def test_killed_at_each_operation_of_a_save_the_old_or_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at random: before every system call of a save, and in the middle of every write."""
    found, code, operation = [], None, 0
    while code != 0:
        folder = tmp_path / str(operation)
        folder.mkdir()
        save_checkpoint(folder, {**_STATE, "position": {"epoch": 1, "step": 0, "history": []}}, keep=1)
        child = os.fork()
        if child == 0:  # leaves by os._exit alone: pytest must not go on twice
            try:
                _killed_at(operation, monkeypatch)
                save_checkpoint(folder, {**_STATE, "position": {"epoch": 2, "step": 0, "history": []}}, keep=1)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(load_checkpoint(folder)["position"]["epoch"])
        operation += 1
    assert found == sorted(found) and set(found) == {1, 2} and operation > 8
    assert len(list_checkpoints(folder)) == 1
