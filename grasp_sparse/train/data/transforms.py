"""What worker processes do to a decoded image: crop, flip, resize; bytes in, bytes out (normalising is the device's work)."""

from __future__ import annotations

from torchvision.transforms import v2

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data.normalization import Normalization

PHOTOGRAPHS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet's training images, as everybody uses them
_RESIZE = 256 / 224


def photograph_transforms(config: TrainConfig, size: int) -> tuple[v2.Transform, v2.Transform]:
    """(augmented, plain) for pictures of any size: a random part of it, or the middle, as `size` x `size`."""
    augmented = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *_further(config)]
    return v2.Compose(augmented), v2.Compose([v2.Resize(round(size * _RESIZE)), v2.CenterCrop(size), v2.PILToTensor()])


def small_image_transforms(config: TrainConfig, size: int) -> tuple[v2.Transform, v2.Transform]:
    """(augmented, plain) for pictures that are `size` x `size` already: shifted by up to four pixels and flipped, or as they are."""
    augmented = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), *_further(config)]
    return v2.Compose(augmented), v2.PILToTensor()


def _further(config: TrainConfig) -> list[v2.Transform]:
    steps: list[v2.Transform] = [v2.TrivialAugmentWide()] if config.trivial_augment else []
    steps.append(v2.PILToTensor())
    if config.random_erasing:
        # to the mean, which normalisation turns into zero
        steps.append(v2.RandomErasing(config.random_erasing, value=tuple(round(255 * mean) for mean in PHOTOGRAPHS.mean)))
    return steps
