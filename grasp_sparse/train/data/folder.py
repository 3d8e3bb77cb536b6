"""Images that are files, decoded by worker processes with torchvision's transforms; what cannot be decoded is named and passed over."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader

from grasp_sparse.train.data.corrupt import CorruptImages
from grasp_sparse.train.data.images import WHOLE, Share, epoch_order, generator_for
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.signals import PREEMPTION

_SAMPLE = 3
Transform = Callable[[Image.Image], Tensor]
Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class Decoding:
    """How files become batches. `pin_memory`: batches lie where a GPU copies from without waiting."""

    workers: int = 0
    pin_memory: bool = False


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a job; the parent, which is to save, needs its workers until then."""
    for number in {signal.SIGINT, *PREEMPTION} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    # SIGTERM is also how multiprocessing ends its children
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _Decoder(Dataset):
    """Item (index, seed) -> (image uint8 [C, H, W] or None, label, failures): one file decoded and transformed.

    Augmentation depends on the seed given, not on which worker draws it. In place of a file that cannot be read comes the next one
    that can, in the order of the files, where neighbours are mostly of one class; or None unless `replace`.
    """

    def __init__(self, images: FolderImages, transform: Transform, replace: bool) -> None:
        self.images, self.transform, self.replace = images, transform, replace

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, Failures]:
        index, seed = key
        failures: Failures = []
        # more tries than the limit are of no use: the failures end the run
        for _ in range(min(self.images.corrupt.limit + 1, len(self.images)) if self.replace else 1):
            try:
                image = default_loader(self.images.path(index))
            except Exception as error:  # what PIL raises on bytes that are no image has no common class
                failures.append((self.images.path(index), _reason(error)))
                index = (index + 1) % len(self.images)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would restart the GPU's stream too
                return self.transform(image), int(self.images.labels[index]), failures
        return None, -1, failures


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]


def _collate(items: list[tuple[Tensor | None, int, Failures]]) -> tuple[Tensor, Tensor, int, Failures]:
    """Images and labels of the items that have one, how many have none, and the failures of all."""
    failures = [failure for _, _, failed in items for failure in failed]
    images = [image for image, _, _ in items if image is not None]
    labels = torch.tensor([label for image, label, _ in items if image is not None], dtype=torch.int64)
    return (torch.stack(images) if images else torch.empty(0)), labels, len(items) - len(images), failures


class _Keys:
    """Lists of (index, seed), one per batch, made when asked for: an epoch of ImageNet has a million keys."""

    def __init__(self, count: int, batch: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self.count, self.batch = count, batch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.count):
            indices, seeds = self.batch(number)
            yield list(zip(indices.tolist(), seeds.tolist(), strict=True))


class FolderImages:
    """One split of images that are files; same interface as MemoryImages, batches of (uint8 [n, C, H, W], int64 [n]).

    `files`: (path, class) of every image. `augmented` and `plain` turn a decoded RGB image into uint8 [C, H, W]. Training and
    scoring batches keep their size when a file is corrupt (the next readable one stands in), evaluation leaves it out.
    """

    def __init__(
        self, files: Sequence[tuple[str, int]], augmented: Transform, plain: Transform, corrupt: CorruptImages,
        decoding: Decoding = Decoding(),
    ) -> None:  # fmt: skip
        # one block of bytes: a list of a million strings is copied page by page into every worker, which counts references to them
        self._paths = np.array([os.fsencode(path) for path, _ in files])
        self.labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        self.augmented, self.plain, self.corrupt, self.decoding = augmented, plain, corrupt, decoding

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def identity(self) -> Iterator[bytes]:
        """What tells this split from others without opening a file: names below the folder that all share, and classes, in order.

        Not the files' sizes: whoever mends an unreadable image may go on.
        """
        paths = self._paths.tolist()
        shared = os.path.commonprefix([min(paths, default=b""), max(paths, default=b"")]).rfind(os.fsencode(os.sep)) + 1
        yield f"{len(paths)};".encode()
        for path in paths:
            yield path[shared:] + b"\0"
        yield self.labels.numpy().tobytes()

    def _load(self, keys: _Keys, transform: Transform, replace: bool) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Decoder(self, transform, replace), batch_sampler=keys, num_workers=self.decoding.workers, collate_fn=_collate,
            pin_memory=self.decoding.pin_memory, worker_init_fn=_leave_signals_to_parent if self.decoding.workers else None,
            # the loader draws a seed for its workers: from a generator of its own, not the run's
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        for images, labels, missing, failures in loader:
            self.corrupt.add(failures)
            if replace and missing:
                path, reason = failures[-1]
                raise UserError(f"Expected at least one readable image beside {path}, got none ({reason}); look at the data set")
            if len(labels):
                yield images, labels

    def batches(self, parts: Sequence[Tensor], replace: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each of these lists of indices, centre-cropped and not augmented, decoded as far ahead as workers go."""
        keys = _Keys(len(parts), lambda number: (parts[number], torch.zeros_like(parts[number])))
        return self._load(keys, self.plain, replace)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Those images, centre-cropped and not augmented, with their labels."""
        return next(self.batches([indices]))

    def in_order(self, batch_size: int, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Every readable image once over all parts, centre-cropped: for evaluation."""
        mine = torch.arange(len(self))[share.rank :: share.size]
        return self.batches(mine.split(batch_size), replace=False)

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, augment: bool = True, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This part's training batches of one epoch from `first_step` on; an incomplete last step is left out."""
        order = epoch_order(len(self), seed, epoch)
        seeds = torch.randint(2**62, (len(self),), generator=generator_for(seed, _SAMPLE, epoch))

        def batch(number: int) -> tuple[Tensor, Tensor]:
            places = share.places(batch_size, first_step + number)
            return order[places], seeds[places]

        steps = share.steps(len(self), batch_size) - first_step
        return self._load(_Keys(max(0, steps), batch), self.augmented if augment else self.plain, replace=True)
