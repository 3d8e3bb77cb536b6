"""Checkpoints of a run: by the clock, on a full disk, damaged; and one command that starts a run, goes on with it and ends it."""

from __future__ import annotations

import errno
import json
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
from grasp_sparse.masks import MaskSet
from grasp_sparse.train import checkpoint, engine, recorder, run
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


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full(monkeypatch: pytest.MonkeyPatch, full: Callable[[int], bool]) -> list[int]:
    """A disk on which the saves of those numbers find no room."""
    real, saves = engine.save_checkpoint, []

    def save(*arguments):
        saves.append(len(saves) + 1)
        if full(saves[-1]):
            _no_room()
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
    with monkeypatch.context() as patch:
        patch.setattr(EpochLog, "write", _no_room)
        with pytest.warns(UserWarning, match="cannot write .*log.jsonl .*No space.* writes all of it"):
            start_run(config_of(epochs=1), tmp_path)
    resume_run(tmp_path, NET)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_line_that_was_cut_short_is_mended_with_the_next_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history: list[dict] = []
    log = EpochLog(tmp_path, history)
    log.write()
    history.append({"epoch": 1})
    log.write()
    history.append({"epoch": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: _CutShort(path))
        with pytest.raises(OSError, match="No space"):
            log.write()
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n{"ep'
    history.append({"epoch": 3})
    log.write()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history


class _CutShort:
    """A file on a disk with room for four more bytes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __enter__(self) -> _CutShort:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def writelines(self, lines: list[str]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(lines)[:4])
        _no_room()


def test_a_disk_without_room_for_events_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "wants_tensorboard", lambda choice: True)
    monkeypatch.setattr(recorder, "TensorBoardLog", _no_room)
    with pytest.warns(UserWarning, match="no more events for TensorBoard in this run .*No space"):
        start_run(config_of(epochs=1), tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 0)


def test_a_result_that_finds_no_room_says_that_the_training_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_atomically", _no_room)
        with pytest.raises(UserError, match="cannot write .*result.json .*No space.* complete and saved.* --resume"):
            start_run(config_of(), tmp_path)
    resume_run(tmp_path, NET)
    assert same_end(tmp_path, whole) and (tmp_path / "result.json").is_file()


def test_older_checkpoints_that_cannot_be_deleted_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "drop_old_checkpoints", _no_room)
        with pytest.warns(UserWarning, match="cannot delete older checkpoints") as said:
            start_run(config_of(), tmp_path)
    assert len(said) == len(list_checkpoints(tmp_path)) == 4
    assert same_end(tmp_path, whole)


def test_masks_that_find_no_room_leave_the_run_that_was_to_be_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run(config_of(epochs=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(MaskSet, "save", _no_room)
    with pytest.raises(OSError, match="No space"):
        start_run(config_of(epochs=2, seed=1), tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_somebody_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links in it are replaced, or refused, but nothing is written through them."""
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    with monkeypatch.context() as patch:
        at_call(5, _no_room, engine, "training_step", patch)
        with pytest.raises(OSError, match="No space"):
            start_run(config_of(), run_dir)
    outside.write_text("mine")
    for name in ("log.jsonl", "result.json"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(outside)
    resume_run(run_dir, NET)
    assert not (run_dir / "log.jsonl").is_symlink() and not (run_dir / "result.json").is_symlink()
    (run_dir / ".lock").unlink()
    (run_dir / ".lock").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        resume_run(run_dir, NET)
    assert outside.read_text() == "mine"


def test_a_result_of_epochs_that_are_lost_goes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run(config_of(keep_checkpoints=3), tmp_path)
    newest = list_checkpoints(tmp_path)[0]
    newest.write_bytes(b"")
    (tmp_path / "report.html").touch()
    with monkeypatch.context() as patch:
        at_call(1, _no_room, engine, "training_step", patch)
        with pytest.warns(UserWarning, match="going back"), pytest.raises(OSError, match="No space"):
            resume_run(tmp_path, NET)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "report.html").exists()


def test_nothing_but_damaged_checkpoints_is_said_and_left_as_it_is(tmp_path: Path) -> None:
    start_run(config_of(epochs=1), tmp_path)
    for path in list_checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="cannot read any checkpoint in .*; start a new run, or --overwrite this one"):
        continue_or_start_run(config_of(), {**NET, "epochs": 3}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
        before = {path.name for path in whole.iterdir()}
        with pytest.raises(UserError, match="another process is training the run in"):
            start_run(config_of(seed=1), whole, overwrite=True)
        assert {path.name for path in whole.iterdir()} == before
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
