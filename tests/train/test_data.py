"""Data: batches depend on their place in the run alone; augmentation moves pixels as told; files are found or explained."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import fashion_mnist
from grasp_sparse.train.data.images import MemoryImages, class_balanced, generator_for, shift_and_flip, shift_draws
from grasp_sparse.train.data.normalization import Normalization, in_layout
from grasp_sparse.train.data.scoring import ScoringBatches
from grasp_sparse.train.data.sets import load_data
from grasp_sparse.train.distributed import Ranks
from grasp_sparse.train.errors import UserError


def _split(count: int = 50, side: int = 8) -> MemoryImages:
    images = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator_for(1))
    return MemoryImages(images, torch.arange(count) % 5, pad=1)


def _equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


def test_an_epoch_can_be_entered_at_any_step() -> None:
    split = _split()
    whole = list(split.shuffled(8, seed=3, epoch=2))
    torch.rand(10)  # the global stream has no say in it
    assert len(whole) == 6
    assert _equal(whole[4:], list(split.shuffled(8, seed=3, epoch=2, first_step=4)))


def test_seed_and_epoch_change_the_order() -> None:
    split = _split()
    orders = [[y.tolist() for _, y in split.shuffled(8, seed, epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_without_augmentation_an_epoch_shows_every_image_once_as_it_is() -> None:
    split = _split(48)
    seen = torch.cat([x for x, _ in split.shuffled(8, 0, 0, augment=False)])
    stored = torch.cat([x for x, _ in split.in_order(7)])
    assert torch.equal(seen.flatten(1).sum(1).sort().values, stored.flatten(1).sum(1).sort().values)


_DIMENSIONS = {"nchw": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "chwn": (1, 2, 3, 0)}


@pytest.mark.parametrize("layout", _DIMENSIONS)
def test_bytes_are_normalised_and_laid_out_in_one_go(layout: str) -> None:
    images = torch.randint(0, 256, (4, 2, 5, 3), dtype=torch.uint8)
    prepared = Normalization((0.5, 0.25), (0.25, 0.5))(images, "cpu", layout)
    expected = (images / 255 - torch.tensor([0.5, 0.25]).view(2, 1, 1)) / torch.tensor([0.25, 0.5]).view(2, 1, 1)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)
    assert prepared.permute(_DIMENSIONS[layout]).is_contiguous()
    assert in_layout(prepared, layout) is prepared and torch.equal(in_layout(prepared.contiguous(), layout), prepared)


def test_every_augmented_image_is_a_shifted_maybe_flipped_original() -> None:
    images = torch.randint(1, 256, (64, 2, 6, 6), dtype=torch.uint8, generator=generator_for(5))
    augmented = shift_and_flip(images, 1, shift_draws(64, 1, generator_for(7)))
    assert augmented.shape == images.shape and augmented.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for image, result in zip(padded, augmented):
        windows = {
            (dy, dx, flip): (window.flip(-1) if flip else window)
            for dy in range(3) for dx in range(3) for flip in (False, True)
            for window in [image[:, dy : dy + 6, dx : dx + 6]]
        }  # fmt: skip
        matches = [key for key, window in windows.items() if torch.equal(window, result)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 12  # of 18 possible ones, in 64 draws


def test_scoring_samples_are_balanced_in_every_micro_batch() -> None:
    labels = torch.arange(100) % 10
    indices = class_balanced(labels, 4, seed=0)
    assert len(set(indices.tolist())) == 40
    for part in indices.split(10):
        assert labels[part].sort().values.tolist() == list(range(10))


def test_micro_batches_with_room_for_some_classes_hold_a_sample_of_them() -> None:
    """Not neighbours in the list of classes: every tenth of it has about as many as any other."""
    labels = torch.arange(3000) % 1000
    indices = class_balanced(labels, 2, seed=0)
    assert labels[indices[:1000]].sort().values.tolist() == list(range(1000))  # in rounds
    for part in indices.split(50):
        classes = labels[part]
        assert len(classes.unique()) == 50 and len((classes // 100).unique()) >= 8
    assert not torch.equal(labels[indices[:1000]], labels[indices[1000:]])


def test_classes_with_fewer_images_give_all_they_have() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    indices = class_balanced(labels, 5, seed=0)
    assert labels[indices].bincount().tolist() == [5, 3, 5] and len(indices.unique()) == 13
    assert [sorted(labels[indices[i : i + 3]].tolist()) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


def _scored_on(labels: Tensor, per_class: int, size: int) -> list[Tensor]:
    """The labels of each micro-batch."""
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return [y for _, y in ScoringBatches(MemoryImages(images, labels), per_class, size, seed=0)]


@pytest.mark.parametrize(
    ("classes", "per_class", "size", "expected"),
    [(3, 7, 20, [12, 9]), (10, 5, 50, [50]), (10, 6, 20, [20] * 3), (10, 7, 20, [20, 20, 20, 10]), (3, 7, 2, [2] * 10 + [1]), (4, 5, 3, [3] * 6 + [2])],
)  # fmt: skip
def test_micro_batches_of_scoring_are_of_one_size_and_balanced(classes: int, per_class: int, size: int, expected: list[int]) -> None:
    """With no last one of a single image, which no batch norm takes, where that can be."""
    batches = _scored_on(torch.arange(classes * 10) % classes, per_class, size)
    assert [len(batch) for batch in batches] == expected
    for batch in batches:
        counts = batch.bincount(minlength=classes)
        assert batch.equal(batch.sort().values) and (size < classes or counts.max() == counts.min())


def test_micro_batches_of_classes_of_unequal_sizes_are_of_one_size() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    assert [len(batch) for batch in _scored_on(labels, 7, 8)] == [6, 6, 5]


def _write_idx(path: Path, data: Tensor) -> None:
    header = bytes([0, 0, 8, data.dim()]) + b"".join(n.to_bytes(4, "big") for n in data.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + data.numpy().tobytes())


def _write_fashion_mnist(folder: Path, suffix: str = "", count: int = 20) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
    for stem in ("train", "t10k"):
        _write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images)
        _write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", (torch.arange(count) % 10).to(torch.uint8))
    return images


@pytest.mark.parametrize(("below", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", "")])
def test_fashion_mnist_is_read_gzipped_plain_and_from_torchvisions_layout(tmp_path: Path, below: str, suffix: str) -> None:
    images = _write_fashion_mnist(tmp_path / below, suffix)
    data = load_data(TrainConfig(data_dir=str(tmp_path), batch_size=4, train_limit=12))
    assert torch.equal(data.train.images[:, 0], images[:12])
    assert (len(data.train), len(data.test), data.shape, data.num_classes) == (12, 20, (1, 28, 28), 10)


def test_scoring_samples_of_a_million_labels_are_chosen_in_a_moment() -> None:
    labels = (torch.arange(1_000_003) * 7919) % 1000
    indices = class_balanced(labels, 3, seed=1)
    assert labels[indices].bincount().tolist() == [3] * 1000 and len(indices.unique()) == 3000
    assert torch.equal(labels[indices[:1000]].sort().values, torch.arange(1000))


def test_missing_fashion_mnist_names_the_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "_download", lambda folder: None)
    with pytest.raises(UserError, match="--data-dir DIR; apt-get install dataset-fashion-mnist .*download") as error:
        load_data(TrainConfig(data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "downloads"), [(1, 1), (2, 0)])
def test_fashion_mnist_is_downloaded_by_one_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, downloads: int
) -> None:
    asked = []
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "_download", asked.append)
    monkeypatch.setattr(fashion_mnist, "current_ranks", lambda: Ranks(size=size))
    with pytest.raises(UserError, match="run once in one process"):
        load_data(TrainConfig(data_dir=str(tmp_path)))
    assert len(asked) == downloads


def test_a_data_dir_that_is_not_there_is_an_error_even_if_data_are_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected --data-dir to be a folder"):
        load_data(TrainConfig(data_dir=str(tmp_path / "typo")))


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "wrong magic"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    _write_fashion_mnist(tmp_path, ".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:1000], "not gzip": b"hello", "wrong magic": gzip.compress(b"\1\2\3\4" * 99)}[damage])
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz"):
        load_data(TrainConfig(data_dir=str(tmp_path), batch_size=4))


def _write_folder(root: Path, splits: tuple[str, ...] = ("train", "val"), classes: tuple[str, ...] = ("a", "b")) -> None:
    for split in splits:
        for number, label in enumerate(classes):
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 16), (60 * i, 200 * number, 90)).save(root / split / label / f"{i}.png")


def test_imagefolder_gives_the_same_batches_in_process_and_from_workers(tmp_path: Path) -> None:
    _write_folder(tmp_path)
    make = lambda workers: load_data(  # noqa: E731
        TrainConfig(data="imagefolder", data_dir=str(tmp_path), image_size=16, workers=workers, batch_size=4)
    )
    state = torch.get_rng_state()
    here, workers = (list(make(n).train.shuffled(4, seed=0, epoch=1)) for n in (0, 1))
    assert _equal(here, workers) and here[0][0].shape == (4, 3, 16, 16) and here[0][0].dtype == torch.uint8
    assert _equal(here[1:], list(make(0).train.shuffled(4, seed=0, epoch=1, first_step=1)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("missing", ["data_dir", "root", "test", "classes"])
def test_a_broken_imagefolder_is_explained(tmp_path: Path, missing: str) -> None:
    if missing == "test":
        _write_folder(tmp_path, splits=("train",))
    if missing == "classes":
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
    folder = {"data_dir": None, "root": str(tmp_path / "none")}.get(missing, str(tmp_path))
    with pytest.raises(UserError, match="imagefolder|find any class"):
        load_data(TrainConfig(data="imagefolder", data_dir=folder))
