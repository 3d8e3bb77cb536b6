"""Files that are no images: named, counted, replaced by the next readable one in training, left out in evaluation, up to a limit."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from image_files import write_class_folders
from page_reader import Page
from small_runs import at_call

from grasp_sparse.report.run_page import write_report
from grasp_sparse.train import engine
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import folder
from grasp_sparse.train.data.sets import Data, load_data
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.signals import Preempted


def _forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not read it; whoever runs the tests may be root, who reads everything."""
    load = folder.default_loader

    def refuse(asked: str) -> object:
        if asked == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", asked)
        return load(asked)

    monkeypatch.setattr(folder, "default_loader", refuse)


_DAMAGE: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "truncated": (lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "(image file is truncated|Truncated File Read)"),
    "empty": (lambda path, _: path.write_bytes(b""), "not an image"),
    "text": (lambda path, _: path.write_text("404 not found\n"), "not an image"),
    "gone": (lambda path, _: (path.unlink(), path.symlink_to(path.parent / "nowhere")), "No such file"),
    "forbidden": (_forbid, "Permission denied"),
}


def _data(root: Path, **changes: object) -> Data:
    values = {"data": "imagefolder", "data_dir": str(root), "image_size": 8, "workers": 0, **changes}
    return load_data(TrainConfig(**values))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_corrupt_file_is_named_and_the_next_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, suffix: str
) -> None:
    do, reason = _DAMAGE[damage]
    write_class_folders(tmp_path, suffix=suffix)
    path = tmp_path / "train" / "a" / f"1.{suffix}"
    before = _data(tmp_path).train.take(torch.arange(8))
    do(path, monkeypatch)
    data = _data(tmp_path)
    with pytest.warns(UserWarning, match=rf"skipped a corrupt image \(1 of at most 10\): .*train/a/1\.{suffix}: {reason}"):
        images, labels = data.train.take(torch.arange(8))
    assert torch.equal(images, before[0][[0, 2, 2, 3, 4, 5, 6, 7]]) and torch.equal(labels, before[1])
    assert list(data.corrupt.files) == [str(path)] and data.corrupt.take() == 1
    left = torch.cat([x for x, _ in data.train.in_order(3)])
    assert torch.equal(left, before[0][[0, 2, 3, 4, 5, 6, 7]])
    assert data.corrupt.take() == 1 and len(data.corrupt.files) == 1  # met again, but not another file


def test_training_stays_the_same_whoever_decodes_and_batches_keep_their_size(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=6)
    (tmp_path / "train" / "b" / "5.png").write_bytes(b"")  # the last of all: the first one stands in
    runs = []
    for workers in (0, 2):
        data = _data(tmp_path, workers=workers)
        with pytest.warns(UserWarning, match=r"train/b/5\.png"):
            runs.append(list(data.train.shuffled(4, seed=0, epoch=0)))
        assert data.corrupt.take() == 1
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(*runs, strict=True))
    assert [len(x) for x, _ in runs[0]] == [4, 4, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_the_limit_end_the_run_in_one_line_with_the_last_of_them(tmp_path: Path, workers: int) -> None:
    write_class_folders(tmp_path, count=6)
    for number in (0, 2, 4):
        (tmp_path / "train" / "a" / f"{number}.png").write_text("no image")
    data = _data(tmp_path, workers=workers, max_corrupt=2)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"at most 2 corrupt images, got 3, .*a/4\.png: .*--max-corrupt") as error:
        list(data.train.in_order(3))
    assert "\n" not in str(error.value)


def test_a_set_without_one_readable_image_is_an_error(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=1)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="Expected at least one readable image"):
        next(_data(tmp_path).train.shuffled(2, seed=0, epoch=0))


def test_a_run_counts_them_in_its_history(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", count=8)
    for name in ("train/a/3.png", "val/b/0.png"):
        (tmp_path / "images" / name).write_text("")
    config = TrainConfig(
        data="imagefolder", data_dir=str(tmp_path / "images"), image_size=8, workers=0, batch_size=16, epochs=2, dense=True,
        model="vgg_small", model_args={"stem": 4, "widths": [4], "depth": 1}, timing_rounds=0, tensorboard="off",
    )  # fmt: skip
    with pytest.warns(UserWarning) as warned:
        start_run(config, tmp_path / "run")
    assert len([w for w in warned if "corrupt image" in str(w.message)]) == 2
    rows = load_checkpoint(tmp_path / "run")["position"]["history"]
    assert [row["corrupt_images"] for row in rows] == [2, 2]


def test_a_run_that_met_too_many_goes_on_with_a_higher_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "images", count=8)
    config = TrainConfig(
        data="imagefolder", data_dir=str(tmp_path / "images"), image_size=8, workers=0, batch_size=16, epochs=2, dense=True, max_corrupt=1,
        model="vgg_small", model_args={"stem": 4, "widths": [4], "depth": 1}, timing_rounds=0, tensorboard="off",
    )  # fmt: skip
    save = engine.Trainer.save

    def spoil_after_save(self: engine.Trainer, must: bool = True) -> None:
        save(self, must)
        for number in (1, 4, 6):
            (tmp_path / "images" / "train" / "a" / f"{number}.png").write_text("")

    monkeypatch.setattr(engine.Trainer, "save", spoil_after_save)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="at most 1 corrupt images, got [23]"):
        start_run(config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run")["position"]["epoch"] == 1
    with pytest.warns(UserWarning), pytest.raises(UserError, match="at most 1 corrupt images"):
        resume_run(tmp_path / "run", {})
    with pytest.warns(UserWarning, match="of at most 3"):
        resume_run(tmp_path / "run", {"max_corrupt": 3})
    state = load_checkpoint(tmp_path / "run")
    assert state["position"]["history"][-1]["corrupt_images"] == 3 and state["config"]["max_corrupt"] == 3


def test_what_was_met_before_an_interruption_counts_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file once, also where the images lie elsewhere by then."""
    write_class_folders(tmp_path / "images", count=8)
    config = TrainConfig(
        data="imagefolder", data_dir=str(tmp_path / "images"), image_size=8, workers=0, batch_size=16, epochs=3, dense=True,
        max_corrupt=2, model="vgg_small", model_args={"stem": 4, "widths": [4], "depth": 1}, timing_rounds=0, tensorboard="off",
    )  # fmt: skip
    (tmp_path / "images/train/a/1.png").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="1 of at most 2"), pytest.raises(Preempted):
        at_call(1, lambda: signal.raise_signal(signal.SIGTERM), engine, "training_step", patch)
        start_run(config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run")["corrupt_files"] == ["train/a/1.png"]
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/train/b/2.png").write_bytes(b"")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.warns(UserWarning, match="of at most 2"):
        result = resume_run(tmp_path / "run", {"data_dir": str(tmp_path / "elsewhere")})
    assert result["corrupt_files"] == ["train/a/1.png", "train/b/2.png"]
    assert "image files that could not be read 2" in Page(write_report(tmp_path / "run")).text
    with pytest.raises(UserError, match="at most 1 corrupt images, got 2, .*train/b/2.png"):
        resume_run(copy, {"data_dir": str(tmp_path / "elsewhere"), "max_corrupt": 1})


def test_a_run_without_one_readable_test_image_says_so(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images")
    for path in (tmp_path / "images" / "val").rglob("*.png"):
        path.write_text("")
    config = TrainConfig(
        data="imagefolder", data_dir=str(tmp_path / "images"), image_size=8, workers=0, batch_size=8, epochs=1, dense=True,
        model="vgg_small", model_args={"stem": 4, "widths": [4], "depth": 1}, timing_rounds=0, tensorboard="off",
    )  # fmt: skip
    with pytest.warns(UserWarning), pytest.raises(UserError, match="Expected at least one readable test image, got none of 8"):
        start_run(config, tmp_path / "run")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is known on Linux only")
def test_workers_go_on_when_a_scheduler_signals_every_process(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=24)
    batches = _data(tmp_path, workers=1).train.shuffled(2, seed=0, epoch=0)
    next(batches)
    (worker,) = active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert len(list(batches)) == 23
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is known on Linux only")
def test_workers_end_when_their_parent_says_so(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=24)
    batches = _data(tmp_path, workers=1).train.shuffled(2, seed=0, epoch=0)
    next(batches)
    (worker,) = active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    batches.close()
