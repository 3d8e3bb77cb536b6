"""CIFAR-10 and CIFAR-100, 32x32, held in memory: torchvision's pickles, or the same images as files in class folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2

from grasp_sparse.train.data.class_folders import IMAGEFOLDER_LAYOUT, Files, class_folders
from grasp_sparse.train.data.corrupt import CorruptImages
from grasp_sparse.train.data.folder import Decoding, FolderImages
from grasp_sparse.train.data.images import evenly_spaced
from grasp_sparse.train.data.normalization import Normalization
from grasp_sparse.train.distributed import current_ranks
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import progress_bar

SIDE = 32
_AT_ONCE = 500
Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cifar:
    """One of the two sets: its name, torchvision's reader, classes, and mean and spread of its training pixels."""

    title: str
    reader: type[CIFAR10]
    num_classes: int
    pixels: Normalization


CIFAR = {
    "cifar10": Cifar("CIFAR-10", CIFAR10, 10, Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": Cifar("CIFAR-100", CIFAR100, 100, Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
}


def load_cifar(
    name: str, data_dir: str | None, limits: tuple[int | None, int | None], corrupt: CorruptImages, workers: int
) -> tuple[Images, Images, str, str]:
    """(images uint8 [N, 3, 32, 32], labels) for training and test, at most `limits` of each; the set's title and its folder.

    Files in class folders are all decoded now, corrupt ones left out; the title then says what kind of files they were. Without
    either, torchvision downloads the pickles into `data_dir` or ./data.
    """
    cifar, root = CIFAR[name], Path("data" if data_dir is None else data_dir)
    if data_dir is not None and not root.is_dir():
        raise UserError(f"Expected --data-dir to be a folder, got {data_dir!r}, which does not exist; create it or leave it out")
    if (root / "train").is_dir():
        train, test, classes = class_folders(name, root, IMAGEFOLDER_LAYOUT)
        if len(classes) != cifar.num_classes:
            raise UserError(f"Expected {cifar.num_classes} class folders of {cifar.title} in {root / 'train'}, got {len(classes)}")
        splits = [_decode(files, limit, corrupt, workers) for files, limit in zip((train, test), limits, strict=True)]
        kind = "JPEG" if Path(train[0][0]).suffix.lower() in (".jpg", ".jpeg") else Path(train[0][0]).suffix[1:].upper()
        return *splits, f"{cifar.title} ({kind} files)", str(root)
    root = root.resolve().parent if root.resolve().name == cifar.reader.base_folder else root
    splits = []
    for training, limit in zip((True, False), limits, strict=True):
        found = _read(cifar, root, training)
        images = torch.from_numpy(found.data[:limit]).movedim(-1, 1).contiguous()
        splits.append((images, torch.tensor(found.targets[:limit])))
    return *splits, cifar.title, str(root / cifar.reader.base_folder)


def _read(cifar: Cifar, root: Path, training: bool) -> CIFAR10:
    """torchvision compares checksums before it unpickles: no other file than the published ones is ever opened."""
    missing = not (root / cifar.reader.base_folder).is_dir()
    try:
        # one process at a time may write there
        return cifar.reader(str(root), train=training, download=missing and current_ranks().size == 1)
    except (RuntimeError, OSError) as error:
        found = "found none" if missing else "found others"
        raise UserError(
            f"Expected {cifar.title} in {root}: {found} of the published {cifar.reader.base_folder}/ (unpacked from "
            f"{cifar.reader.url}) nor {IMAGEFOLDER_LAYOUT}; put them there, pass --data-dir DIR, or run once in one process "
            "with network so that torchvision can download them"
        ) from error


def _decode(files: Files, limit: int | None, corrupt: CorruptImages, workers: int) -> Images:
    files = [files[index] for index in evenly_spaced(len(files), limit)]
    images = FolderImages(files, _exact, _exact, corrupt, Decoding(workers))
    with progress_bar(-(-len(files) // _AT_ONCE), 0, "decoding") as bar:
        parts = []
        for part in images.in_order(_AT_ONCE):
            parts.append(part)
            bar.update()
    if not parts:
        raise UserError(f"Expected readable images, got none of {len(files)} like {files[0][0]}")
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _exact(image: Image.Image) -> Tensor:
    if image.size != (SIDE, SIDE):
        raise UserError(f"Expected CIFAR images of {SIDE} x {SIDE} pixels, got {image.size}; --data imagefolder takes any size")
    return v2.functional.pil_to_tensor(image)
