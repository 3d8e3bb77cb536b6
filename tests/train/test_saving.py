"""Checkpoints of a run: by the clock, on a full disk, damaged; and one command that starts a run, goes on with it and ends it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import write_class_folders
from small_runs import NET, at_call, config_of, same_end

from grasp_sparse.files import locked_folder
from grasp_sparse.train import engine, run
from grasp_sparse.train.agreement import Requests
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, list_checkpoints
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import EpochLog
from grasp_sparse.train.run import continue_or_start_run, resume_run, start_run
from grasp_sparse.train.signals import Interrupted, Preempted


def test_checkpoints_by_the_clock_are_within_an_epoch_and_go_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """kill -9 after step 7: what is lost is what came after the last checkpoint, not the epoch."""

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        at_call(8, kill, engine, "training_step", patch)
        with pytest.raises(Killed):
            start_run(config_of(checkpoint_minutes=0.0), tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 3)
    resume_run(tmp_path, {**NET, "checkpoint_minutes": 10.0})
    assert same_end(tmp_path, whole)
    assert load_checkpoint(tmp_path)["config"]["checkpoint_minutes"] == 10.0


def test_the_clock_counts_from_the_last_save() -> None:
    requests = Requests([], save_seconds=0.05)
    assert requests.mine() == (False, False, False)
    time.sleep(0.06)
    assert requests.mine()[0]
    requests.saved()
    assert not requests.mine()[0]
    assert not Requests([], save_seconds=600).mine()[0]


def _full(monkeypatch: pytest.MonkeyPatch, full: Callable[[int], bool]) -> list[int]:
    """A disk on which the saves of those numbers find no room."""
    real, saves = engine.save_checkpoint, []

    def save(*arguments):
        saves.append(len(saves) + 1)
        if full(saves[-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(engine, "save_checkpoint", save)
    return saves


def test_a_full_disk_is_a_warning_and_the_next_save_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    saves = _full(monkeypatch, lambda number: number == 3)
    with pytest.warns(UserWarning, match="cannot write the checkpoint of epoch 3, step 0 .*No space.*training goes on") as said:
        start_run(config_of(), tmp_path)
    assert len(said) == 1 and saves == [1, 2, 3, 4]
    assert same_end(tmp_path, whole)


def test_a_disk_that_is_full_at_the_end_is_an_error_and_what_was_saved_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    with monkeypatch.context() as patch:
        _full(patch, lambda number: number >= 3)
        message = "cannot write the checkpoint .*No space.* make room, .*--resume"
        with pytest.warns(UserWarning), pytest.raises(UserError, match=message):
            start_run(config_of(), tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 0)
    resume_run(tmp_path, NET)
    assert same_end(tmp_path, whole)


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EpochLog, "append", full)
    with pytest.warns(UserWarning, match="cannot write epoch 1 to"):
        start_run(config_of(epochs=1), tmp_path)
    monkeypatch.undo()
    resume_run(tmp_path, NET)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_damaged_checkpoints_are_put_aside_and_the_run_ends_as_if_they_had_not_been(tmp_path: Path, whole: Path) -> None:
    start_run(config_of(epochs=3, keep_checkpoints=3), tmp_path)
    newest, second, _ = list_checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    second.write_bytes(b"")
    with pytest.warns(UserWarning, match=f"going back to {checkpoint_name(1, 0)}"):
        resume_run(tmp_path, NET)
    assert same_end(tmp_path, whole)
    assert {path.name for path in tmp_path.glob("*.damaged")} == {f"{newest.name}.damaged", f"{second.name}.damaged"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_a_network_disk_does_not_give_is_not_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    start_run(config_of(keep_checkpoints=3), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        with pytest.raises(UserError, match="cannot read checkpoint .*Stale file handle"):
            resume_run(tmp_path, NET)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    resume_run(tmp_path, NET)
    assert same_end(tmp_path, whole)


def test_auto_starts_goes_on_and_ends_by_one_and_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    given = {**NET, "epochs": 3}
    for _ in range(2):
        with monkeypatch.context() as patch:
            at_call(5, lambda: signal.raise_signal(signal.SIGTERM), engine, "training_step", patch)
            with pytest.raises(Preempted):
                continue_or_start_run(config_of(), given, tmp_path)
    result = continue_or_start_run(config_of(), given, tmp_path)
    assert same_end(tmp_path, whole)
    monkeypatch.setattr(engine, "training_step", lambda *_: pytest.fail("the run was complete"))
    again = continue_or_start_run(config_of(), given, tmp_path)
    assert {**again, "training": 0} == {**result, "training": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"lr": 0.5}, "--lr 0.5 .the run: 0.05."), ({"epochs": 9, "seed": 3}, "--epochs 9 .the run: 3., --seed 3 .the run: 0."),
     ({"model": "resnet18"}, "--model resnet18 .the run: several_ranks:noisy_net.")],
    ids=str,
)  # fmt: skip
def test_a_flag_that_contradicts_the_run_is_refused(whole: Path, given: dict, message: str) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(UserError, match=f"Expected the recipe of the run in .*, got another {message}; leave it out"):
        continue_or_start_run(config_of(), {**NET, **given}, whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_some_of_the_arguments_of_the_model_do_not_contradict_the_run(tmp_path: Path) -> None:
    config = config_of(model_args={"dropout": 0.25}, epochs=1)
    start_run(config, tmp_path)
    resume_run(tmp_path, {**NET, "model_args": {}})
    resume_run(tmp_path, {**NET, "model_args": {"dropout": 0.25}})
    with pytest.raises(UserError, match="got another --model-args"):
        resume_run(tmp_path, {**NET, "model_args": {"dropout": 0.5}})


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, whole: Path) -> None:
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(whole / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another process is training the run in"):
            resume_run(whole, NET)
    finally:
        holder.kill()
        holder.wait()
    with locked_folder(whole):  # a killed process holds nothing
        pass


def test_a_run_stands_after_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """What was scored is not scored again, whatever ends the run from then on."""

    def end() -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        at_call(2, end, engine, "training_step", patch)
        with pytest.raises(OSError, match="gone"):
            start_run(config_of(), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(0, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "masks_for", None)
        resume_run(tmp_path, NET)
    assert same_end(tmp_path, whole)


def test_resumed_inside_an_epoch_with_two_threads_and_images_from_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "images", count=16)
    files = {"data": "imagefolder", "data_dir": str(tmp_path / "images"), "image_size": 16, "workers": 2, "train_limit": None}
    config, before = config_of(**files, batch_size=8, epochs=2), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        start_run(config, tmp_path / "whole")
        with monkeypatch.context() as patch:
            at_call(6, lambda: signal.raise_signal(signal.SIGINT), engine, "training_step", patch)
            with pytest.raises(Interrupted):
                start_run(config, tmp_path / "parts")
        assert list_checkpoints(tmp_path / "parts")[0].name == checkpoint_name(1, 2)
        resume_run(tmp_path / "parts", NET)
    finally:
        torch.set_num_threads(before)
    assert same_end(tmp_path / "whole", tmp_path / "parts")
