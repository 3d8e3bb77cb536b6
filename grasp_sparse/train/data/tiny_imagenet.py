"""Tiny-ImageNet: 200 classes of 500 + 50 colour images, 64x64, as the archive unpacks or with val/ sorted into class folders."""

from __future__ import annotations

from pathlib import Path

from grasp_sparse.train.data.class_folders import Files, class_folders, scan_classes
from grasp_sparse.train.errors import UserError

SIDE = 64
LAYOUT = "train/<wnid>/images/*.JPEG, and val/images/*.JPEG with val/val_annotations.txt, or val/<wnid>/"
_ARCHIVE = "tiny-imagenet-200"
_ANNOTATIONS = "val_annotations.txt"


def tiny_imagenet_files(root: Path) -> tuple[Files, Files, list[str]]:
    """Training files, validation files and classes below `root` or `root`/tiny-imagenet-200."""
    root = root / _ARCHIVE if (root / _ARCHIVE).is_dir() else root
    if not (root / "val" / _ANNOTATIONS).is_file() or not (root / "val" / "images").is_dir():
        return class_folders("tiny-imagenet", root, LAYOUT, tests=("val",))
    train, classes = scan_classes("tiny-imagenet", root / "train", LAYOUT)
    return train, _annotated(root / "val", classes), classes


def _annotated(folder: Path, classes: list[str]) -> Files:
    """What `val_annotations.txt` lists: file name, class and a box, separated by tabs."""
    numbers = {name: number for number, name in enumerate(classes)}
    path = folder / _ANNOTATIONS
    files = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in numbers:
            raise UserError(f"Expected line {line_number} of {path} to be a file and one of the classes of train/, got {line[:60]!r}")
        files.append((str(folder / "images" / name), numbers[wnid]))
    if not files:
        raise UserError(f"Expected {path} to list the images of val/, it is empty; unpack the archive again")
    return files
