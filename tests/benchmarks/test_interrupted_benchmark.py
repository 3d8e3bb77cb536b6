"""benchmarks.interrupted: both signals hit a run in the middle of an epoch, and its end is that of one left alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import interrupted
from benchmarks.run_states import differing_parts
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.run import start_run


def test_a_run_stopped_twice_ends_as_one_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "found.json"
    assert interrupted.main(["--quick", "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "last checkpoints differ in: nothing" in said
    assert [line.split(":")[0] for line in said.splitlines() if " to " in line] == ["SIGTERM to torchrun", "SIGKILL to rank 1"]
    told = (tmp_path / "runs" / "interrupted.txt").read_text()
    assert told.count("going on at epoch") == 2  # once a restart, by one rank


def test_differing_ends_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    config = TrainConfig(
        data="fake", image_size=8, train_limit=32, test_limit=8, batch_size=16, epochs=1, samples_per_class=1, timing_rounds=0,
        plan="density", tensorboard="off", model_args={"stem": 4, "widths": [8], "depth": 1},
    )  # fmt: skip
    for seed in (0, 1):
        start_run(dataclasses.replace(config, seed=seed), tmp_path / f"{seed}")
    parts = differing_parts(tmp_path / "0", tmp_path / "1")
    assert {"recipe", "model", "rng", "history"} <= set(parts)
    assert differing_parts(tmp_path / "0", tmp_path / "0") == []

    monkeypatch.setattr(interrupted, "interrupted", lambda *_: {"differing_parts": parts})
    assert interrupted.main(["--quick"]) == 1
    assert f"last checkpoints differ in: {', '.join(parts)}" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [(["--epochs", "1", "--quick"], "at least 2, one for each stop; got 1"), ([], "Expected --data-dir")])
def test_bad_input_is_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        interrupted.main([*flags, "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_the_committed_run_ended_as_one_left_alone() -> None:
    found = json.loads((interrupted.RESULTS / "interrupted.json").read_text())
    assert found["differing_parts"] == []
    assert [stop["sent"] for stop in found["stops"]] == ["SIGTERM", "SIGKILL"]
    whole, parts = found["runs"]["undisturbed"], found["runs"]["interrupted"]
    assert whole["train_loss"] == parts["train_loss"] and whole["test_accuracy"] == parts["test_accuracy"]
