"""A run goes on with the data it was started with: told by names, classes and counts, wherever the folder is by then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import write_class_folders

from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data.images import MemoryImages
from grasp_sparse.train.data.sets import load_data
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.run import resume_run, start_run


def _config(root: Path, **changes: object) -> TrainConfig:
    values = {
        "data": "imagefolder", "data_dir": str(root), "image_size": 8, "workers": 0, "batch_size": 8, "epochs": 1, "dense": True,
        "model": "vgg_small", "model_args": {"stem": 4, "widths": [4], "depth": 1}, "timing_rounds": 0, "tensorboard": "off", **changes,
    }  # fmt: skip
    return TrainConfig(**values)


def _digest(root: Path, **changes: object) -> str:
    return load_data(_config(root, **changes)).digest


_CHANGES: dict[str, Callable[[Path], object]] = {
    "renamed": lambda root: (root / "train/a/1.png").rename(root / "train/a/11.png"),
    "one less": lambda root: (root / "val/b/3.png").unlink(),
    "of another class": lambda root: (root / "train/b/3.png").rename(root / "train/a/4.png"),
    "a class renamed": lambda root: [(root / split / "b").rename(root / split / "c") for split in ("train", "val")],
}


@pytest.mark.parametrize("change", _CHANGES)
def test_another_name_count_or_class_is_another_digest(tmp_path: Path, change: str) -> None:
    write_class_folders(tmp_path)
    before = _digest(tmp_path)
    _CHANGES[change](tmp_path)
    assert _digest(tmp_path) != before


def test_place_and_pixels_are_not_in_the_digest(tmp_path: Path) -> None:
    """A copy elsewhere, and an image that is mended or spoilt; no file is opened."""
    write_class_folders(tmp_path / "here")
    before = _digest(tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere" / "images-of-mine")
    for path in (tmp_path / "elsewhere").rglob("*.png"):
        path.write_bytes(b"")
    assert _digest(tmp_path / "elsewhere" / "images-of-mine") == before


def test_limits_and_sizes_are_in_the_digest(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    changes: list[dict[str, int]] = [{}, {"train_limit": 4}, {"test_limit": 4}, {"image_size": 9}]
    assert len({_digest(tmp_path, **change) for change in changes}) == len(changes)


def test_images_in_memory_are_told_by_classes_in_their_order_and_by_shape() -> None:
    images, labels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2])
    splits = [(images, labels), (images, labels.flip(0)), (images[:5], labels[:5]), (images[:, :, :3], labels)]
    assert len({b"".join(MemoryImages(*split).identity()) for split in splits}) == len(splits)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run of them, complete: going on with it evaluates nothing more."""
    folder = tmp_path_factory.mktemp("started")
    write_class_folders(folder / "images")
    start_run(_config(folder / "images"), folder / "run")
    return folder


def test_a_run_goes_on_where_its_data_have_moved(started: Path, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path / "copy")
    (tmp_path / "copy" / "images").rename(tmp_path / "moved")
    result = resume_run(tmp_path / "copy" / "run", {"data_dir": str(tmp_path / "moved")})
    assert result["data"]["digest"] == load_checkpoint(started / "run")["data"]["digest"]


@pytest.mark.parametrize(
    ("change", "message"),
    [("renamed", "other file names or classes"), ("one less", r"test 7 \(the run: 8\)"), ("of another class", "other file names or classes")],
)
def test_a_run_does_not_go_on_with_other_data(started: Path, tmp_path: Path, change: str, message: str) -> None:
    shutil.copytree(started, tmp_path / "copy")
    _CHANGES[change](tmp_path / "copy" / "images")
    run = tmp_path / "copy" / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    expected = f"Expected the data that the run in {run} was started with, got others in .*images: {message}; name .*--data-dir"
    with pytest.raises(UserError, match=expected) as error:
        resume_run(run, {"data_dir": str(tmp_path / "copy" / "images")})
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
