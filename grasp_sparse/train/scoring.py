"""The images that weights are scored on: chosen from labels alone, decoded a micro-batch at a time, as often as they are read."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from grasp_sparse.train.folder import FolderImages
from grasp_sparse.train.images import WHOLE, MemoryImages, Share, class_balanced


class ScoringBatches:
    """Micro-batches (uint8 [n, C, H, W], int64 [n]) that give the same bits each time they are iterated.

    `per_class` images of every class, not augmented, cut into micro-batches of `batch_size` in which classes take turns. Of these every
    `share.size`-th belongs to this process: they stay whole, so their union, and what BatchNorm makes of each, does not depend on
    the number of processes. A process can have none.
    """

    def __init__(self, images: MemoryImages | FolderImages, per_class: int, batch_size: int, seed: int, share: Share = WHOLE) -> None:
        self.images = images
        parts = class_balanced(images.labels, per_class, seed).split(batch_size)
        self.total = sum(map(len, parts))
        self.parts = parts[share.rank :: share.size]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.images.batches(self.parts)
