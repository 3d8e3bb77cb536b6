"""The layer shapes that are measured, in groups whose geometric means are quoted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass(frozen=True)
class ConvShape:
    """A k x k convolution of `batch` square images; `count` says how often a network has it."""

    in_channels: int
    out_channels: int
    size: int
    batch: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    bias: bool = True
    count: int = field(default=1, compare=False)

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return (
            f"conv{self.kernel}x{self.kernel}{stride} {self.in_channels}->{self.out_channels} at {self.size}x{self.size} "
            f"batch {self.batch}"
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, self.kernel, self.kernel

    @property
    def input_grad(self) -> bool:
        """Whether a network needs the gradient of the input: not of the images themselves."""
        return self.in_channels > 3

    @property
    def work(self) -> int:
        """Multiply-adds of a forward pass."""
        side = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return self.batch * side**2 * self.kernel**2 * self.in_channels * self.out_channels

    def layer(self) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel, self.stride, self.padding, bias=self.bias)

    def input(self, generator: torch.Generator) -> torch.Tensor:
        """On the device of `generator`."""
        shape = self.batch, self.in_channels, self.size, self.size
        return torch.randn(shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class LinearShape:
    in_features: int
    out_features: int
    batch: int
    count: int = field(default=1, compare=False)

    input_grad = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def __str__(self) -> str:
        return f"linear {self.in_features}->{self.out_features} batch {self.batch}"

    @property
    def work(self) -> int:
        """Multiply-adds of a forward pass."""
        return self.batch * self.in_features * self.out_features

    def layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features)

    def input(self, generator: torch.Generator) -> torch.Tensor:
        """On the device of `generator`."""
        return torch.randn(self.batch, self.in_features, generator=generator, device=generator.device)


Shape = ConvShape | LinearShape


def conv3x3(batches: Sequence[int] = (128,)) -> list[Shape]:
    """The 3x3 convolutions of networks for 32x32 images."""
    sizes = ((64, 32), (128, 16), (256, 8), (512, 4))
    return [ConvShape(channels, channels, size, batch) for batch in batches for channels, size in sizes]


def convolutions(make: Callable[[], nn.Module], batch: int, side: int = 224) -> list[ConvShape]:
    """Every distinct convolution of a network for square images, with how often it occurs, as the model itself has it."""
    found: Counter[ConvShape] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
        kernel, stride, padding = (pair[0] for pair in (conv.kernel_size, conv.stride, conv.padding))
        size = inputs[0].shape[-1]
        found[ConvShape(conv.in_channels, conv.out_channels, size, batch, kernel, stride, padding, conv.bias is not None)] += 1

    with torch.device("meta"):
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, side, side))
    return [replace(shape, count=count) for shape, count in found.items()]


def resnet50(batches: Sequence[int] = (16, 32)) -> list[Shape]:
    """Every distinct convolution of torchvision's ResNet-50 at 224x224."""
    from torchvision import models

    return [shape for batch in batches for shape in convolutions(models.resnet50, batch)]


def linear(batches: Sequence[int] = (128, 512, 2048)) -> list[Shape]:
    sizes = ((1024, 1024), (4096, 1024), (1024, 4096), (768, 3072))
    return [LinearShape(*size, batch) for batch in batches for size in sizes]


GROUPS = {"conv3x3": conv3x3, "resnet50": resnet50, "linear": linear}
QUICK: dict[str, list[Shape]] = {
    "conv3x3": [ConvShape(128, 128, 16, 128)],
    "resnet50": [ConvShape(256, 64, 56, 4, kernel=1, padding=0, bias=False)],
    "linear": [LinearShape(1024, 1024, 512)],
}
