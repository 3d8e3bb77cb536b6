"""Data sets by name, all with one interface: two splits that give shuffled, ordered or chosen batches of bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import class_folders as folders
from grasp_sparse.train.data import tiny_imagenet as tiny
from grasp_sparse.train.data.cifar import CIFAR, SIDE, load_cifar
from grasp_sparse.train.data.corrupt import CorruptImages
from grasp_sparse.train.data.fashion_mnist import load_fashion_mnist
from grasp_sparse.train.data.folder import Decoding, FolderImages, Transform
from grasp_sparse.train.data.images import WHOLE, MemoryImages, Share, evenly_spaced, generator_for
from grasp_sparse.train.data.normalization import Normalization
from grasp_sparse.train.data.scoring import ScoringBatches
from grasp_sparse.train.data.transforms import PHOTOGRAPHS, photograph_transforms, small_image_transforms
from grasp_sparse.train.errors import UserError

_MOST_FAKE_BYTES = 1 << 30
_IMAGENET_CLASSES = 1000
_SIZED = ("imagenet", "imagefolder", "fake")
_DECODED_IN_TRAINING = ("tiny-imagenet", "imagenet", "imagefolder")


@dataclass
class Data:
    """`shape` is (channels, height, width); `source` says in words where the images came from.

    Batches of both splits are (uint8 [N, C, H, W], int64 [N]) on the CPU; `prepare` makes of them what a model takes.
    """

    name: str
    source: str
    num_classes: int
    shape: tuple[int, int, int]
    train: MemoryImages | FolderImages
    test: MemoryImages | FolderImages
    pixels: Normalization
    corrupt: CorruptImages = field(default_factory=lambda: CorruptImages(0))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what has to be the same from start to end and on every rank; no image is read for it."""
        hashed = hashlib.sha256(f"{self.num_classes} {list(self.shape)};".encode())
        for split in (self.train, self.test):
            for part in split.identity():
                hashed.update(part)
        return hashed.hexdigest()

    def describe(self) -> dict[str, Any]:
        """In plain values, as a result and a checkpoint hold it; with it a model can be rebuilt without the images."""
        return {
            "name": self.name, "source": self.source, "train": len(self.train), "test": len(self.test),
            "num_classes": self.num_classes, "shape": list(self.shape), "mean": list(self.pixels.mean), "std": list(self.pixels.std),
            "digest": self.digest,
        }  # fmt: skip

    def prepare(self, images: Tensor, device: str | torch.device, layout: str = "nchw") -> Tensor:
        """uint8 -> normalised float32 on `device`, lying there as "nchw", "channels_last" or "chwn" (batch innermost)."""
        return self.pixels(images, device, layout)

    def scoring_batches(self, per_class: int, batch_size: int, seed: int, share: Share = WHOLE) -> ScoringBatches:
        """Class-balanced training images, not augmented; every pass of a criterion sees the same inputs."""
        return ScoringBatches(self.train, per_class, batch_size, seed, share)


def load_data(config: TrainConfig) -> Data:
    """The data set that `config` names. Raises UserError, which says what is expected where, when it is missing or damaged."""
    if config.image_size is not None and config.data not in _SIZED:
        raise UserError(f"Expected no --image-size with {config.data}, whose images have one; {', '.join(_SIZED)} take it")
    if (config.trivial_augment or config.random_erasing) and config.data not in _DECODED_IN_TRAINING:
        raise UserError(
            f"Expected neither --trivial-augment nor --random-erasing with {config.data}, which is held in memory; "
            f"{', '.join(_DECODED_IN_TRAINING)} take them"
        )
    if (config.trivial_augment or config.random_erasing) and not config.augment:
        raise UserError(
            "Expected neither --trivial-augment nor --random-erasing with --no-augment, which shows images as they are; leave it out, or "
            "switch them off (--no-trivial-augment --random-erasing 0)"
        )
    loaders: dict[str, Callable[[TrainConfig], Data]] = {
        "fashion-mnist": _fashion_mnist, "cifar10": _cifar, "cifar100": _cifar, "tiny-imagenet": _tiny_imagenet,
        "imagenet": _imagenet, "imagefolder": _imagefolder, "fake": _fake,
    }  # fmt: skip
    return loaders[config.data](config)


def _fashion_mnist(config: TrainConfig) -> Data:
    splits, folder = load_fashion_mnist(config.data_dir)
    limits = {"train": config.train_limit, "test": config.test_limit}
    train, test = (MemoryImages(x[: limits[s]], y[: limits[s]]) for s, (x, y) in splits.items())
    # mean and spread of the training images
    return Data("Fashion-MNIST", str(folder), 10, (1, 28, 28), train, test, Normalization((0.2860,), (0.3530,)))


def _cifar(config: TrainConfig) -> Data:
    corrupt = CorruptImages(config.max_corrupt, config.data_dir or "data")
    limits = (config.train_limit, config.test_limit)
    train, test, title, source = load_cifar(config.data, config.data_dir, limits, corrupt, config.workers)
    splits = [MemoryImages(*split, pad=4) for split in (train, test)]
    cifar = CIFAR[config.data]
    return Data(title, source, cifar.num_classes, (3, SIDE, SIDE), *splits, cifar.pixels, corrupt)


def _tiny_imagenet(config: TrainConfig) -> Data:
    root = folders.data_root(config.data, config.data_dir, tiny.LAYOUT)
    found = tiny.tiny_imagenet_files(root)
    return _of_files("Tiny-ImageNet", root, *found, config, tiny.SIDE, small_image_transforms(config, tiny.SIDE))


def _imagenet(config: TrainConfig) -> Data:
    root = folders.data_root(config.data, config.data_dir, folders.IMAGENET_LAYOUT)
    train, test, classes = folders.imagenet_folders(root)
    name = "ImageNet" if len(classes) == _IMAGENET_CLASSES else f"ImageNet ({len(classes)} classes)"
    return _photographs(name, root, train, test, classes, config)


def _imagefolder(config: TrainConfig) -> Data:
    root = folders.data_root(config.data, config.data_dir, folders.IMAGEFOLDER_LAYOUT)
    return _photographs("imagefolder", root, *folders.class_folders(config.data, root, folders.IMAGEFOLDER_LAYOUT), config)


def _photographs(
    name: str, root: Path, train: folders.Files, test: folders.Files, classes: list[str], config: TrainConfig
) -> Data:
    size = config.image_size or 224
    return _of_files(name, root, train, test, classes, config, size, photograph_transforms(config, size))


def _of_files(
    name: str, root: Path, train: folders.Files, test: folders.Files, classes: list[str], config: TrainConfig, size: int,
    transforms: tuple[Transform, Transform],
) -> Data:  # fmt: skip
    """A set decoded while it is used; mean and spread are those of ImageNet."""
    corrupt = CorruptImages(config.max_corrupt, root)
    decoding = Decoding(config.workers, pin_memory=config.device.startswith("cuda"))
    splits = []
    for files, limit in ((train, config.train_limit), (test, config.test_limit)):
        files = [files[index] for index in evenly_spaced(len(files), limit)]
        splits.append(FolderImages(files, *transforms, corrupt, decoding))
    return Data(name, str(root), len(classes), (3, size, size), *splits, PHOTOGRAPHS, corrupt)


def _fake(config: TrainConfig) -> Data:
    """Ten noisy prototypes in colour: learnable, made in a moment, the same for every seed."""
    size, counts = config.image_size or 32, (config.train_limit or 1024, config.test_limit or 256)
    if (needed := sum(counts) * 3 * size * size) > _MOST_FAKE_BYTES:
        raise UserError(
            f"Expected fake images of at most {_MOST_FAKE_BYTES:,} bytes together, got {needed:,}; lower --image-size, "
            "--train-limit or --test-limit"
        )
    generator = generator_for(0)
    prototypes = torch.randint(0, 256, (10, 3, size, size), generator=generator)

    def split(count: int) -> MemoryImages:
        labels = torch.arange(count) % 10
        noise = torch.randint(0, 256, (count, 3, size, size), generator=generator)
        return MemoryImages(((prototypes[labels] + noise) // 2).to(torch.uint8), labels, pad=max(1, size // 14))

    train, test = map(split, counts)
    return Data("fake", "generated", 10, (3, size, size), train, test, Normalization((0.5,) * 3, (0.25,) * 3))
