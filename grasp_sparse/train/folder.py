"""Images in class folders (`root/train/<class>/*.jpg`), decoded by worker processes with torchvision's transforms."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from grasp_sparse.train.errors import UserError
from grasp_sparse.train.images import epoch_order, generator_for

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_TAIL = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
_SAMPLE = 3


def _leave_ctrl_c_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Seeded(Dataset):
    """Item (index, seed) -> (image, label): augmentation depends on the seed given, not on which worker draws it."""

    def __init__(self, folder: ImageFolder, transform: v2.Transform) -> None:
        self.folder, self.transform = folder, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        path, label = self.folder.samples[index]
        try:
            image = self.folder.loader(path)
        except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
            raise UserError(f"cannot read image {path}: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), label


class FolderImages:
    """One split of an image folder; same interface as MemoryImages."""

    def __init__(self, root: Path, image_size: int, workers: int, limit: int | None) -> None:
        self.folder = ImageFolder(str(root))
        if limit is not None and limit < len(self.folder.samples):
            # evenly spaced: the samples are sorted by class, the first ones would all be of one class
            chosen = torch.linspace(0, len(self.folder.samples) - 1, limit).long().tolist()
            self.folder.samples = [self.folder.samples[i] for i in chosen]
        self.labels = torch.tensor([label for _, label in self.folder.samples])
        self.workers = workers
        self._augmented = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *_TAIL])
        self._plain = v2.Compose([v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size), *_TAIL])

    def __len__(self) -> int:
        return len(self.labels)

    def _load(self, batches: list[list[tuple[int, int]]], transform: v2.Transform) -> Iterator[tuple[Tensor, Tensor]]:
        # the loader draws a worker base seed: give it a generator of its own, not the run's
        generator = torch.Generator().manual_seed(0)
        dataset = _Seeded(self.folder, transform)
        loader = DataLoader(
            dataset, batch_sampler=batches, num_workers=self.workers, generator=generator,
            worker_init_fn=_leave_ctrl_c_to_parent if self.workers else None,
        )
        return iter(loader)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Those images, centre-cropped, normalised and not augmented, with their labels."""
        return next(self._load([[(i, 0) for i in indices.tolist()]], self._plain))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, as stored: for evaluation."""
        keys = [(i, 0) for i in range(len(self))]
        return self._load([keys[s : s + batch_size] for s in range(0, len(keys), batch_size)], self._plain)

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch from `first_step` on; an incomplete last batch is left out."""
        order = epoch_order(len(self), seed, epoch).tolist()
        seeds = torch.randint(2**62, (len(self),), generator=generator_for(seed, _SAMPLE, epoch)).tolist()
        keys = [(index, seeds[index]) for index in order]
        steps = range(first_step, len(keys) // batch_size)
        batches = [keys[s * batch_size : (s + 1) * batch_size] for s in steps]
        return self._load(batches, self._augmented if augment else self._plain)
