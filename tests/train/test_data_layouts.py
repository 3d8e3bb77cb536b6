"""Every data set in the folder layouts people have it in, and one line that says what is expected where there is none."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from image_files import write_class_folders
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import cifar
from grasp_sparse.train.data.sets import Data, load_data
from grasp_sparse.train.errors import UserError

_WNIDS = ("n01440764", "n01443537")
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _load(data: str, root: Path, **changes: object) -> Data:
    return load_data(TrainConfig(data=data, data_dir=str(root), workers=0, **changes))


def _write_pickles(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The files of a set in miniature, and their checksums where torchvision looks for them."""
    reader = cifar.CIFAR[name].reader
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    label_key = "labels" if name == "cifar10" else "fine_labels"
    splits: dict[str, list] = {"train_list": [], "test_list": []}
    for kind in splits:
        sums = []
        for file_name, _ in getattr(reader, kind):
            images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
            labels = torch.randint(0, 10, (6,))
            content = pickle.dumps({"data": images.flatten(1).numpy(), label_key: labels.tolist()})
            (folder / file_name).write_bytes(content)
            sums.append([file_name, hashlib.md5(content).hexdigest()])
            splits[kind].append((images, labels))
        monkeypatch.setattr(reader, kind, sums)
    content = pickle.dumps({reader.meta["key"]: list(_CIFAR_CLASSES)})
    (folder / reader.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": hashlib.md5(content).hexdigest()})
    return {kind: tuple(torch.cat(parts) for parts in zip(*batches)) for kind, batches in splits.items()}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("given", ["above", "itself"])
def test_cifar_is_read_from_its_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str) -> None:
    stored = _write_pickles(tmp_path, monkeypatch, name)
    base = cifar.CIFAR[name].reader.base_folder
    data = _load(name, tmp_path if given == "above" else tmp_path / base, test_limit=4)
    assert torch.equal(data.train.images, stored["train_list"][0]) and torch.equal(data.train.labels, stored["train_list"][1])
    assert torch.equal(data.test.images, stored["test_list"][0][:4]) and len(data.test) == 4
    assert (data.shape, data.num_classes, data.source) == ((3, 32, 32), int(name[5:]), str(tmp_path / base))


def test_other_pickles_than_the_published_ones_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_pickles(tmp_path, monkeypatch, "cifar10")

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="Expected CIFAR-10 in .*found others of the published cifar-10-batches-py/"):
        _load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_cifar_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(self: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(cifar.CIFAR10, "download", no_network)
    with pytest.raises(UserError, match="found none of the published cifar-100-python/.*train/<class>.*--data-dir DIR") as error:
        _load("cifar100", tmp_path)
    assert "\n" not in str(error.value)


def test_cifar_in_class_folders_is_decoded_once_into_memory(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("train", "test"), _CIFAR_CLASSES, count=3, size=(32, 32))
    (tmp_path / "train" / "cat" / "1.png").write_text("no image")
    with pytest.warns(UserWarning, match="cat/1.png"):
        data = _load("cifar10", tmp_path)
    assert data.train.images.shape == (29, 3, 32, 32) and data.train.images.dtype == torch.uint8
    assert data.train.labels.bincount().tolist() == [3, 3, 3, 2, 3, 3, 3, 3, 3, 3]
    assert data.name == "CIFAR-10 (PNG files)" and len(data.test) == 30
    few = _load("cifar10", tmp_path, test_limit=10)
    assert few.test.labels.bincount().tolist() == [1] * 10


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [(("a", "b"), (32, 32), "Expected 10 class folders of CIFAR-10"), (_CIFAR_CLASSES, (28, 32), r"32 x 32 pixels, got \(28, 32\)")],
    ids=["classes", "size"],
)
def test_class_folders_of_another_set_are_no_cifar(tmp_path: Path, classes: tuple, size: tuple, message: str) -> None:
    write_class_folders(tmp_path, ("train", "test"), classes, count=1, size=size)
    with pytest.raises(UserError, match=message):
        _load("cifar10", tmp_path)


def test_imagenet_is_class_folders_named_by_wordnet(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("train", "val"), _WNIDS, suffix="jpeg")
    data = _load("imagenet", tmp_path)
    assert (data.name, data.shape, data.num_classes, len(data.train)) == ("ImageNet (2 classes)", (3, 224, 224), 2, 8)
    assert next(data.test.in_order(2))[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize(
    ("classes", "loose", "message"),
    [(("cat", "dog"), False, "got classes like 'cat' .*imagefolder"), (_WNIDS, True, "images lie right in it, move each into")],
    ids=["names", "loose images"],
)
def test_what_is_not_laid_out_as_imagenet_is_explained(tmp_path: Path, classes: tuple, loose: bool, message: str) -> None:
    write_class_folders(tmp_path, ("train",) if loose else ("train", "val"), classes, count=1)
    if loose:
        (tmp_path / "val").mkdir()
        (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match="Expected imagenet to have train/<wnid>.*" + message):
        _load("imagenet", tmp_path)


@pytest.mark.parametrize("form", ["archive", "annotations", "class folders"])
def test_tiny_imagenet_is_read_as_it_unpacks_and_rearranged(tmp_path: Path, form: str) -> None:
    root = tmp_path / "tiny-imagenet-200" if form == "archive" else tmp_path
    for wnid in _WNIDS:
        write_class_folders(root / "train" / wnid, ("",), ("images",), count=2, size=(64, 64), suffix="JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0.JPEG\t0\t0\t9\t9\n")
    if form == "class folders":
        write_class_folders(root, ("val",), _WNIDS, count=2, size=(64, 64), suffix="JPEG")
    else:
        write_class_folders(root / "val", ("",), ("images",), count=4, size=(64, 64), suffix="JPEG")
        lines = [f"{number}.JPEG\t{_WNIDS[number // 2]}\t0\t0\t9\t9\n" for number in range(4)]
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
    data = _load("tiny-imagenet", tmp_path)
    assert (data.shape, data.num_classes, len(data.train)) == ((3, 64, 64), 2, 4)
    x, y = next(data.test.in_order(4))
    assert x.shape == (4, 3, 64, 64) and y.tolist() == [0, 0, 1, 1]


def test_a_wrong_line_of_the_annotations_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("train",), _WNIDS, count=1)
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.JPEG\tn01440764\t0\n1.JPEG\tn99999999\t0\n")
    with pytest.raises(UserError, match=r"Expected line 2 of .*val_annotations.txt to be a file and one of the classes"):
        _load("tiny-imagenet", tmp_path)


@pytest.mark.parametrize(("name", "layout"), [("imagenet", "train/<wnid>/"), ("imagefolder", "train/<class>/"), ("tiny-imagenet", "val_annotations")])
@pytest.mark.parametrize("missing", ["no flag", "no folder", "empty folder"])
def test_a_set_that_is_not_there_says_which_layout_is_expected(tmp_path: Path, name: str, layout: str, missing: str) -> None:
    folder = {"no flag": None, "no folder": str(tmp_path / "none"), "empty folder": str(tmp_path)}[missing]
    with pytest.raises(UserError, match=layout) as error:
        load_data(TrainConfig(data=name, data_dir=folder))
    assert "\n" not in str(error.value)


def test_sets_of_one_size_refuse_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected no --image-size with cifar10"):
        _load("cifar10", tmp_path, image_size=64)


@pytest.mark.parametrize("changes", [{"trivial_augment": True}, {"random_erasing": 0.1}], ids=lambda changes: next(iter(changes)))
def test_images_as_they_are_refuse_what_would_change_them(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UserError, match="neither --trivial-augment nor --random-erasing with --no-augment, .*leave it out"):
        load_data(TrainConfig(data="imagefolder", data_dir=str(tmp_path), augment=False, **changes))


@pytest.mark.parametrize("changes", [{"trivial_augment": True}, {"random_erasing": 0.1}], ids=lambda changes: next(iter(changes)))
def test_sets_in_memory_refuse_what_only_workers_do(changes: dict) -> None:
    with pytest.raises(UserError, match="neither --trivial-augment nor --random-erasing with fake, which is held in memory"):
        load_data(TrainConfig(data="fake", **changes))
