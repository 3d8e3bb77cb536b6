"""Folders of small image files for tests: `root/<split>/<class>/<number>.<suffix>`, every image another noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from grasp_sparse.train.data.images import generator_for


def write_class_folders(
    root: Path, splits: Sequence[str] = ("train", "val"), classes: Sequence[str] = ("a", "b"), count: int = 4,
    size: tuple[int, int] = (20, 16), suffix: str = "png",
) -> None:  # fmt: skip
    """`count` images of (width, height) `size` in each class of each split."""
    generator = generator_for(3)
    for split in splits:
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(root / split / label / f"{number}.{suffix}")
