"""A signal that reaches any rank while rank 0 works alone stops all of them within seconds, and they say what stands, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import several_ranks
import waiting_runs

_FEW = 10.0  # seconds


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("waiting")
    done = subprocess.run(
        [sys.executable, waiting_runs.__file__, str(folder)], env={**os.environ, **several_ranks.python_path()},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "happened.json").read_text())


@pytest.mark.parametrize("to", waiting_runs.RECEIVERS)
@pytest.mark.parametrize("number", waiting_runs.NUMBERS)
def test_a_signal_after_the_last_step_ends_all_ranks_with_the_run_saved(happened: dict[str, Any], number: str, to: str) -> None:
    stop = happened[f"comparing, {number} to {to}"]
    assert stop["codes"] == [{"SIGTERM": 0, "Ctrl-C": 130}[number]] * 2, stop["said"]
    assert stop["seconds"] < _FEW and stop["stands"] == [8, 0]
    words = {"SIGTERM": "stopped by a signal", "Ctrl-C": "interrupted"}[number]
    assert f"grasp-sparse: {words}; saved, go on with: grasp-sparse train --resume" in stop["said"][0]
    assert not any("error" in said for said in stop["said"]) and "grasp-sparse:" not in stop["said"][1]


@pytest.mark.parametrize("to", waiting_runs.RECEIVERS)
@pytest.mark.parametrize("number", waiting_runs.NUMBERS)
def test_a_signal_before_the_first_step_does_not_look_like_success_on_any_rank(
    happened: dict[str, Any], number: str, to: str
) -> None:
    stop = happened[f"masks, {number} to {to}"]
    assert stop["codes"] == [{"SIGTERM": 143, "Ctrl-C": 130}[number]] * 2, stop["said"]
    assert stop["seconds"] < _FEW
    assert "; nothing was saved" in stop["said"][0]
    assert not any("error" in said for said in stop["said"]) and "grasp-sparse:" not in stop["said"][1]


@pytest.mark.parametrize("to", waiting_runs.RECEIVERS)
def test_a_signal_while_a_checkpoint_is_written_lets_it_be_written(happened: dict[str, Any], to: str) -> None:
    stop = happened[f"saving, SIGTERM to {to}"]
    assert stop["codes"] == [0, 0], stop["said"]
    assert stop["seconds"] < _FEW and (0, 0) < tuple(stop["stands"]) < (1, 0)
    assert "grasp-sparse: stopped by a signal; saved, go on with: grasp-sparse train --resume" in stop["said"][0]


@pytest.mark.parametrize(
    ("how", "codes"), [("rank 0 dies", [-signal.SIGKILL, 2]), ("rank 1 dies", [2, -signal.SIGKILL]), ("no word", [2, 7])]
)
def test_a_rank_that_is_gone_does_not_hold_the_other(happened: dict[str, Any], how: str, codes: list[int]) -> None:
    stop = happened[how]
    assert stop["codes"] == codes, stop["said"]
    assert stop["seconds"] < _FEW
    assert "another rank of this run is gone" in stop["said"][codes.index(2)]
