"""Signals: a run that they stop is saved, and goes on by the same command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several_ranks
import torch
from small_runs import COMMAND, NET, at_call, config_of, same_end

from grasp_sparse import cli
from grasp_sparse.train import beside_dense, distributed, engine, evaluation, prepare, run, signals
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, list_checkpoints
from grasp_sparse.train.engine import Trainer
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.signals import (
    Interrupted,
    Preempted,
    deferred_stop,
    preemption_raises,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("steps", [2, 4, 12], ids=["inside an epoch", "between epochs", "after the last step"])
def test_a_schedulers_signal_ends_the_step_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, number: signal.Signals, steps: int
) -> None:
    with monkeypatch.context() as patch:
        at_call(steps, lambda: (signal.raise_signal(number), signal.raise_signal(number)), engine, "training_step", patch)
        message = "stopped by a signal; saved, go on with: .*--resume .* --model several_ranks:noisy_net"
        with pytest.raises(Preempted, match=message) as stop:
            start_run(config_of(), tmp_path)
    assert stop.value.saved
    position = load_checkpoint(tmp_path)["position"]
    assert position["epoch"] * 4 + position["step"] == steps
    resume_run(tmp_path, NET)
    assert same_end(tmp_path, whole)


def test_a_signal_during_evaluation_does_not_wait_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """Evaluating ImageNet takes minutes. The epoch stays open and is evaluated when the run goes on."""
    looked = []
    batches = evaluation.evaluation_batches

    def watched(*arguments):
        for batch in batches(*arguments):
            looked.append(None)
            if len(looked) == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluation_batches", watched)
        with pytest.raises(Preempted):
            start_run(config_of(test_limit=100), tmp_path / "parts")
    assert len(looked) <= 2
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == [checkpoint_name(0, 4), checkpoint_name(0, 1)]
    resume_run(tmp_path / "parts", NET)
    start_run(config_of(test_limit=100), tmp_path / "whole")
    assert same_end(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_the_command_saves_and_exits_0_within_seconds(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "grasp_sparse", "train", *COMMAND, "--epochs", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **several_ranks.python_path()}
    )
    try:
        deadline = time.monotonic() + 60
        while not list_checkpoints(tmp_path / "run") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, time.monotonic() - start < 5) == (0, True), errors
    expected = f"grasp-sparse: stopped by a signal; saved, go on with: grasp-sparse train --resume {tmp_path / 'run'}"
    assert errors.strip().splitlines()[-1] == expected
    load_checkpoint(tmp_path / "run")


def test_a_signal_before_anything_is_saved_does_not_look_like_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "masks_for", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["train", *COMMAND, "--out", str(tmp_path / "run")]) == 143
    assert "stopped by a signal; nothing was saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line that a signal ended after its sixth step, of twelve."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call(6, lambda: signal.raise_signal(signal.SIGTERM), engine, "training_step", patch)
        assert cli.main(["train", *COMMAND, "--epochs", "3", "--out", str(folder)]) == 0
    return folder


_WHILE_RESUMING: dict[str, tuple[object, str]] = {
    "beginning": (distributed, "start_distributed"), "the folder locked": (run, "locked_folder"), "read": (run, "read_checkpoint"),
    "recipe": (run, "resumed_config"), "data": (prepare, "load_data"), "weights": (run, "load_weights"), "the rest": (Trainer, "restore"),
    "said": (run, "say"), "recorder": (engine, "Recorder"), "batches": (engine, "train_batches"),
}  # fmt: skip


@pytest.mark.parametrize("auto", [False, True], ids=["resume DIR", "resume auto"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGUSR1", "Ctrl-C"])
@pytest.mark.parametrize("where", _WHILE_RESUMING)
def test_a_signal_while_a_run_is_resumed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, half: Path, where: str, number: int, code: int,
    auto: bool,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    at_call(1, lambda: signal.raise_signal(number), *_WHILE_RESUMING[where], monkeypatch)
    command = ["train", *COMMAND, "--epochs", "3", "--resume", "auto", "--out"] if auto else ["train", "--resume"]
    assert cli.main([*command, str(folder)]) == code
    said = capsys.readouterr().err.strip().splitlines()
    stopped = "interrupted" if code else "stopped by a signal"
    assert said == [f"grasp-sparse: {stopped}; saved, go on with: grasp-sparse train --resume {folder}"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    position = load_checkpoint(folder)["position"]
    assert 4 * position["epoch"] + position["step"] in (6, 7)  # a step, where they had begun


def test_a_signal_before_a_complete_run_is_looked_at_again_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """It has no step left after which somebody would look."""
    shutil.copytree(whole, tmp_path / "run")
    at_call(1, lambda: signal.raise_signal(signal.SIGTERM), engine, "Recorder", monkeypatch)
    monkeypatch.setattr(run, "beside_dense", lambda *_: pytest.fail("went on"))
    with pytest.raises(Preempted, match="stopped by a signal; saved, go on with") as stop:
        resume_run(tmp_path / "run", {**NET, "timing_rounds": 2})
    assert stop.value.saved


def test_a_stop_while_a_run_is_resumed_names_the_model_that_has_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    at_call(1, lambda: signal.raise_signal(signal.SIGINT), run, "read_checkpoint", monkeypatch)
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--model", NET["model"]]) == 130
    expected = f"interrupted; saved, go on with: grasp-sparse train --resume {tmp_path / 'run'} --model {NET['model']}"
    assert expected in capsys.readouterr().err


def test_ctrl_c_where_there_is_nothing_to_resume_is_still_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "newest_good_checkpoint", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stop:
        resume_run(tmp_path, {})
    assert not isinstance(stop.value, Interrupted)


def test_a_signal_while_handlers_change_leaves_those_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption_raises():
        outer = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted), pytest.MonkeyPatch.context() as patch:
            at_call(1, lambda: signal.raise_signal(signal.SIGTERM), signals.signal, "signal", patch)
            with deferred_stop():
                pytest.fail("it was not raised")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (before, outer)


def test_a_signal_while_steps_are_timed_ends_a_run_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(beside_dense, "_times_beside_dense", lambda *_: signal.raise_signal(signal.SIGTERM))
    flags = [*COMMAND, "--epochs", "1", "--timing-rounds", "2", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags]) == 0
    assert "stopped by a signal; saved, go on with" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")["position"]["finished"]
    monkeypatch.undo()
    results = []
    for more in ((), (), ("--timing-rounds", "3"), ("--timing-rounds", "3", "--threads", "2")):
        assert cli.main(["train", "--resume", "auto", *flags, *more]) == 0
        results.append(json.loads((tmp_path / "run" / "result.json").read_text()))
    torch.set_num_threads(1)
    first, again, anew, with_threads = (result["timing"] for result in results)
    assert first and first == again != anew  # a loop that starts a finished run again and again measures it once
    assert with_threads["environment"]["threads"] == results[3]["config"]["threads"] == 2 and results[2]["config"]["threads"] == 1
    assert first["environment"] == results[0]["environment"]


def test_the_command_line_refuses_what_contradicts_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["train", *COMMAND, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*flags, "--resume", "auto"]) == 0
    assert cli.main([*flags, "--resume", "auto"]) == 0
    assert cli.main([*flags, "--resume", "auto", "--workers", "3"]) == 0  # may change
    capsys.readouterr()
    assert cli.main([*flags, "--resume", "auto", "--lr", "0.7"]) == 2
    assert "got another --lr 0.7 (the run: 0.1); leave it out" in capsys.readouterr().err
    assert cli.main([*flags, "--resume", "auto", "--overwrite"]) == 2
    assert "Expected --resume or --overwrite, got both" in capsys.readouterr().err


def test_ctrl_c_is_still_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(2, lambda: signal.raise_signal(signal.SIGINT), engine, "training_step", monkeypatch)
    with pytest.raises(Interrupted, match="interrupted; saved"):
        start_run(config_of(), tmp_path)
