"""Data sets whose classes are folders of image files: train/<class>/*.jpg and test/ or val/ like it."""

from __future__ import annotations

import re
from pathlib import Path

from torchvision.datasets import ImageFolder

from grasp_sparse.train.errors import UserError

Files = list[tuple[str, int]]
_WNID = re.compile(r"n\d{8}")
IMAGEFOLDER_LAYOUT = "train/<class>/*.jpg and test/<class>/*.jpg (or val/)"
IMAGENET_LAYOUT = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, e.g. train/n01440764/"


def data_root(data: str, data_dir: str | None, layout: str) -> Path:
    """`data_dir`, which has to be a folder; UserError says the layout expected in it."""
    if data_dir is None:
        raise UserError(f"--data {data} needs --data-dir DIR with {layout}")
    if not Path(data_dir).is_dir():
        raise UserError(f"Expected --data-dir to be a folder with the {layout} of {data}, got {data_dir!r}, which does not exist")
    return Path(data_dir)


def scan_classes(data: str, folder: Path, layout: str) -> tuple[Files, list[str]]:
    """(path, class) of every image below `folder`, and the names of the classes, sorted as they are numbered."""
    if not folder.is_dir():
        raise UserError(f"Expected {data} to have {layout}, found no folder {folder}")
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folders, or one without images
        reason = str(error).splitlines()[0].rstrip(".")
        loose = any(path.suffix.lower() in (".jpeg", ".jpg", ".png") for path in folder.iterdir())
        hint = "; images lie right in it, move each into the folder of its class" if loose else ""
        raise UserError(f"Expected {data} to have {layout}: {reason}{hint}") from error
    return found.samples, found.classes


def class_folders(data: str, root: Path, layout: str, tests: tuple[str, ...] = ("test", "val")) -> tuple[Files, Files, list[str]]:
    """Training files, test files (the first of the folders `tests` that exists) and classes below `root`."""
    test_root = next((root / name for name in tests if (root / name).is_dir()), root / tests[-1])
    train, classes = scan_classes(data, root / "train", layout)
    test, test_classes = scan_classes(data, test_root, layout)
    if classes != test_classes:
        other = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"Expected the same classes in {root / 'train'} and {test_root}, got {len(classes)} and {len(test_classes)}; "
            f"only one has {', '.join(other[:3])}"
        )
    return train, test, classes


def imagenet_folders(root: Path) -> tuple[Files, Files, list[str]]:
    """As `class_folders`, for classes named by WordNet id; all 1000 or some of them."""
    train, test, classes = class_folders("imagenet", root, IMAGENET_LAYOUT, tests=("val",))
    if strange := [name for name in classes if not _WNID.fullmatch(name)]:
        raise UserError(
            f"Expected imagenet to have {IMAGENET_LAYOUT}, got classes like {strange[0]!r} in {root / 'train'}; "
            "--data imagefolder takes any names"
        )
    return train, test, classes
