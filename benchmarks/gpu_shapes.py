"""The layers and networks that are measured on a GPU, and how much of them by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.shapes import ConvShape, LinearShape, Shape, convolutions

TOKENS = 16384
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
PATTERNS = {"unstructured": None, "block(32, 32)": (32, 32), "block(64, 64)": (64, 64), "block(128, 128)": (128, 128)}


def linear() -> list[Shape]:
    """Square layers whose dense product has from 1 to 16 thousand multiply-adds for each number it reads or writes."""
    return [LinearShape(size, size, TOKENS) for size in (1024, 2048, 4096)]


def _model(name: str) -> nn.Module:
    from torchvision import models  # a second to import

    return getattr(models, name)()


@dataclass(frozen=True)
class GpuNetwork:
    """A torchvision model, the batch it is measured on, and how its masks are scored."""

    name: str
    batch: int
    criterion: str = "grasp"
    side: int = 224  # pixels

    def make(self) -> nn.Module:
        return _model(self.name)


# Attention has no second derivative on the GPU, which GraSP asks for.
NETWORKS = (
    GpuNetwork("vgg16_bn", 64),
    GpuNetwork("resnet50", 128),
    GpuNetwork("wide_resnet50_2", 64),
    GpuNetwork("vit_b_16", 64, criterion="snip"),
)


def convs_of(name: str, batch: int) -> Callable[[], list[Shape]]:
    """Every distinct convolution of a torchvision model at 224 x 224 but the first, which sees three channels."""

    def shapes() -> list[Shape]:
        return [shape for shape in convolutions(lambda: _model(name), batch) if shape.in_channels > 3]

    return shapes


GROUPS: dict[str, Callable[[], list[Shape]]] = {
    "linear": linear,
    "vgg16": convs_of("vgg16", 64),
    "resnet50": convs_of("resnet50", 64),
    "wide_resnet50_2": convs_of("wide_resnet50_2", 64),
}
# Tiny ones, for machines without a GPU: they say that the program runs, nothing about speed.
TINY: list[tuple[str, Shape]] = [
    ("linear", LinearShape(128, 128, 32)),
    ("conv", ConvShape(32, 64, 6, 2, bias=False)),
]
TINY_NETWORK = GpuNetwork("resnet18", 4, criterion="snip", side=32)
