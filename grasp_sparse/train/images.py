"""Images held in memory as one uint8 tensor: shuffled, augmented and normalised a batch at a time, all in torch.

Order and augmentation of a batch depend on (seed, epoch, step) alone, never on what was drawn before, so a run resumed
in the middle of an epoch sees exactly the batches the uninterrupted run would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_ORDER, _AUGMENT, _BALANCED = 0, 1, 2


def generator_for(seed: int, *where: int) -> Generator:
    """A generator whose stream belongs to `seed` and the place `where` (epoch, step, …) in the run."""
    state = seed
    for part in where:
        # splitmix64 step: neighbouring places must not share neighbouring Mersenne seeds
        state = (state + 0x9E3779B97F4A7C15 * (part + 1)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The shuffled order [count] of the training images in one epoch."""
    return torch.randperm(count, generator=generator_for(seed, _ORDER, epoch))


def class_balanced(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of `per_class` images of each class (fewer where a class has fewer), classes interleaved.

    Interleaved, so that every micro-batch cut from them is balanced too.
    """
    order = torch.randperm(len(labels), generator=generator_for(seed, _BALANCED))
    picked = [order[labels[order] == c][:per_class] for c in labels.unique().tolist()]
    rank = torch.cat([torch.arange(len(p)) for p in picked])
    return torch.cat(picked)[rank.argsort(stable=True)]


def shift_and_flip(images: Tensor, pad: int, generator: Generator) -> Tensor:
    """Shift each image of [N, C, H, W] by up to `pad` pixels (zeros come in) and flip every second one."""
    n, c, h, w = images.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows = shifts[0] + torch.arange(h)
    columns = shifts[1] + torch.where(flip, torch.arange(w - 1, -1, -1), torch.arange(w))
    padded = F.pad(images, (pad,) * 4).movedim(1, -1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


class MemoryImages:
    """One split: `images` uint8 [N, C, H, W], `labels` int64 [N], per-channel `mean` and `std` of pixels in 0..1."""

    def __init__(self, images: Tensor, labels: Tensor, mean: list[float], std: list[float]) -> None:
        self.images, self.labels = images, labels
        # (x / 255 - mean) / std as one multiply and one add
        std_column = torch.tensor(std).view(1, -1, 1, 1)
        self._scale = 1 / (255 * std_column)
        self._offset = -torch.tensor(mean).view(1, -1, 1, 1) / std_column

    def __len__(self) -> int:
        return len(self.labels)

    def _normalised(self, images: Tensor) -> Tensor:
        return images.float().mul_(self._scale).add_(self._offset)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Those images, normalised and not augmented, with their labels."""
        return self._normalised(self.images[indices]), self.labels[indices]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, as stored: for evaluation."""
        for start in range(0, len(self), batch_size):
            stop = start + batch_size
            yield self._normalised(self.images[start:stop]), self.labels[start:stop]

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one epoch from `first_step` on; an incomplete last batch is left out."""
        order = epoch_order(len(self), seed, epoch)
        for step in range(first_step, len(self) // batch_size):
            indices = order[step * batch_size : (step + 1) * batch_size]
            images = self.images[indices]
            if augment:
                pad = max(1, images.shape[-1] // 14)
                images = shift_and_flip(images, pad, generator_for(seed, _AUGMENT, epoch, step))
            yield self._normalised(images), self.labels[indices]
