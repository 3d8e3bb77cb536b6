"""Data sets by name, all with one interface: two splits that give shuffled, ordered or chosen batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.fashion_mnist import load_fashion_mnist
from grasp_sparse.train.folder import FolderImages
from grasp_sparse.train.images import MemoryImages, class_balanced, generator_for

_MOST_FAKE_BYTES = 1 << 30


@dataclass
class Data:
    """`shape` is (channels, height, width); `source` says in words where the images came from."""

    name: str
    source: str
    num_classes: int
    shape: tuple[int, int, int]
    train: MemoryImages | FolderImages
    test: MemoryImages | FolderImages

    def scoring_batches(self, per_class: int, batch_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Class-balanced training images, not augmented, as a list: every pass of a criterion sees the same inputs."""
        indices = class_balanced(self.train.labels, per_class, seed)
        return [self.train.take(part) for part in indices.split(batch_size)]


def load_data(config: TrainConfig) -> Data:
    """The data set that `config` names. Raises UserError when it is missing or damaged."""
    return {"fashion-mnist": _fashion_mnist, "imagefolder": _imagefolder, "fake": _fake}[config.data](config)


def _fashion_mnist(config: TrainConfig) -> Data:
    splits, folder = load_fashion_mnist(config.data_dir)
    limits = {"train": config.train_limit, "test": config.test_limit}
    mean, std = [0.2860], [0.3530]  # of the training images
    train, test = (MemoryImages(x[: limits[s]], y[: limits[s]], mean, std) for s, (x, y) in splits.items())
    return Data("Fashion-MNIST", str(folder), 10, (1, 28, 28), train, test)


def _imagefolder(config: TrainConfig) -> Data:
    if config.data_dir is None:
        raise UserError("--data imagefolder needs --data-dir DIR with train/ and test/ (or val/), one folder per class in each")
    root = Path(config.data_dir)
    test_root = root / "test" if (root / "test").is_dir() else root / "val"
    for folder in (root, root / "train", test_root):
        if not folder.is_dir():
            raise UserError(f"Expected a folder {folder}, which does not exist; imagefolder wants train/ and test/ (or val/)")
    size = config.image_size or 224
    try:
        train = FolderImages(root / "train", size, config.workers, config.train_limit)
        test = FolderImages(test_root, size, config.workers, config.test_limit)
    except FileNotFoundError as error:  # ImageFolder: no class folders, or one without images
        raise UserError(f"{root}: {str(error).splitlines()[0]}") from error
    if train.folder.classes != test.folder.classes:
        raise UserError(f"Expected the same classes in {root}/train and {test_root}, got {len(train.folder.classes)} and "
                        f"{len(test.folder.classes)}, or other names")
    return Data("imagefolder", str(root), len(train.folder.classes), (3, size, size), train, test)


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
        return MemoryImages(((prototypes[labels] + noise) // 2).to(torch.uint8), labels, [0.5] * 3, [0.25] * 3)

    train, test = map(split, counts)
    return Data("fake", "generated", 10, (3, size, size), train, test)
