"""Order, augmentation and sharing of training images; and images held in memory as one uint8 tensor.

The order of an epoch depends on (seed, epoch) alone, the augmentation of an image on (seed, epoch) and its place in that order:
never on what was drawn before, nor on how many processes share the work. So a run resumed in the middle of an epoch sees exactly the
batches that the uninterrupted one would have seen, and two processes with batches of b see together what one with 2b sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_ORDER, _AUGMENT, _BALANCED = 0, 1, 2


@dataclass(frozen=True)
class Share:
    """Part `rank` of `size` equal parts of the images of every step."""

    rank: int = 0
    size: int = 1

    def places(self, batch_size: int, step: int) -> slice:
        """Where in the order of an epoch the `batch_size` images stand that are this part of a step."""
        start = (step * self.size + self.rank) * batch_size
        return slice(start, start + batch_size)

    def steps(self, count: int, batch_size: int) -> int:
        """Steps of an epoch of `count` images; what is left over for no whole step is left out."""
        return count // (batch_size * self.size)


WHOLE = Share()


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
    """Indices of `per_class` images of each class (fewer where a class has fewer): one of every class, another of every class, …

    So whatever is cut from them is as balanced as can be. Each round has the classes in an order of its own: a micro-batch with room
    for only some classes holds a sample of them, not neighbours in the list, which in ImageNet are breeds of one animal.
    """
    generator = generator_for(seed, _BALANCED)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    by_class = shuffled.argsort(stable=True)
    counts = shuffled.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within its class
    kept = (rank < per_class).nonzero()[:, 0]
    kept = kept[torch.randperm(len(kept), generator=generator)]
    return order[by_class[kept[rank[kept].argsort(stable=True)]]]


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices: where images are sorted by class, the first ones would all be of one."""
    if limit is None or limit >= count:
        return list(range(count))
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).long().tolist()


def shift_draws(count: int, pad: int, generator: Generator) -> Tensor:
    """What `shift_and_flip` does to each of `count` images, int64 [3, count]: rows and columns shifted, 0..2·pad, and flip, 0 or 1."""
    shifts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    return torch.cat([shifts, torch.randint(0, 2, (1, count), generator=generator)])


def shift_and_flip(images: Tensor, pad: int, draws: Tensor) -> Tensor:
    """Shift each image of [N, C, H, W] by up to `pad` pixels (zeros come in) and flip some, as `draws` [3, N] say."""
    n, c, h, w = images.shape
    down, right, flip = draws[:, :, None]
    rows = down + torch.arange(h)
    columns = right + torch.where(flip.bool(), torch.arange(w - 1, -1, -1), torch.arange(w))
    padded = F.pad(images, (pad,) * 4).movedim(1, -1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


class MemoryImages:
    """One split: `images` uint8 [N, C, H, W], `labels` int64 [N]; augmentation shifts by up to `pad` pixels and flips.

    All batches are (uint8 [n, C, H, W], int64 [n]).
    """

    def __init__(self, images: Tensor, labels: Tensor, pad: int = 2) -> None:
        self.images, self.labels, self.pad = images, labels, pad

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> Iterator[bytes]:
        """What tells this split from others without a look at its pixels: sizes, and the classes in their order."""
        yield f"{list(self.images.shape)};".encode()
        yield self.labels.numpy().tobytes()

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Those images, not augmented, with their labels."""
        return self.images[indices], self.labels[indices]

    def batches(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`take` of each of these lists of indices."""
        return map(self.take, parts)

    def in_order(self, batch_size: int, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once over all parts, as stored: for evaluation."""
        images, labels = self.images[share.rank :: share.size], self.labels[share.rank :: share.size]
        for start in range(0, len(labels), batch_size):
            yield images[start : start + batch_size], labels[start : start + batch_size]

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, augment: bool = True, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This part's training batches of one epoch from `first_step` on; an incomplete last step is left out."""
        order = epoch_order(len(self), seed, epoch)
        # all of an epoch at once, a millisecond: a draw then belongs to a place in the order, whatever the batch size
        draws = shift_draws(len(self), self.pad, generator_for(seed, _AUGMENT, epoch))
        for step in range(first_step, share.steps(len(self), batch_size)):
            places = share.places(batch_size, step)
            images, labels = self.take(order[places])
            yield shift_and_flip(images, self.pad, draws[:, places]) if augment else images, labels
