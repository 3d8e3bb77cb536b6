"""The images that weights are scored on: chosen from labels alone, decoded a micro-batch at a time, as often as they are read."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from grasp_sparse.train.data.folder import FolderImages
from grasp_sparse.train.data.images import WHOLE, MemoryImages, Share, class_balanced


class ScoringBatches:
    """Micro-batches (uint8 [n, C, H, W], int64 [n]) that give the same bits each time they are iterated.

    `per_class` images of every class, not augmented, cut into micro-batches of at most `batch_size`: as equal in size as can be, and
    each with every class equally often where all classes fit into one; sorted by class, as the authors of GraSP do (their halves of
    a batch hold half of the classes). Every `share.size`-th micro-batch belongs to this process. They stay whole, so their union, and what
    BatchNorm makes of each, does not depend on the number of processes. A process can have none. `total` counts the images of all.
    """

    def __init__(self, images: MemoryImages | FolderImages, per_class: int, batch_size: int, seed: int, share: Share = WHOLE) -> None:
        self.images = images
        chosen = class_balanced(images.labels, per_class, seed)
        self.total = len(chosen)
        mine = _cut(chosen, images.labels, batch_size)[share.rank :: share.size]
        self.parts = [part[images.labels[part].argsort(stable=True)] for part in mine]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.images.batches(self.parts)


def _cut(chosen: Tensor, labels: Tensor, most: int) -> tuple[Tensor, ...]:
    """Parts of at most `most` images, none much smaller than the others: of a last one of a few, no batch norm has statistics.

    Where each class is as often among them as any other, in whole rounds of all classes, as `class_balanced` has them in.
    """
    counts = labels[chosen].bincount()
    counts = counts[counts > 0]
    each = len(counts) if 0 < len(counts) <= most and bool((counts == counts[0]).all()) else 1
    rounds = chosen.view(-1, each)
    return tuple(part.flatten() for part in rounds.tensor_split(max(1, -(-len(rounds) // (most // each)))))
