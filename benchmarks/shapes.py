"""The layer shapes that are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvShape:
    """A k x k convolution, stride 1, "same" padding, of `batch` square images."""

    in_channels: int
    out_channels: int
    size: int
    batch: int
    kernel: int = 3

    def __str__(self) -> str:
        return f"conv{self.kernel}x{self.kernel} {self.in_channels}->{self.out_channels} at {self.size}x{self.size} batch {self.batch}"


@dataclass(frozen=True)
class LinearShape:
    in_features: int
    out_features: int
    batch: int

    def __str__(self) -> str:
        return f"linear {self.in_features}->{self.out_features} batch {self.batch}"


QUICK = (ConvShape(128, 128, 16, 128), LinearShape(1024, 1024, 512))
FULL = (
    ConvShape(64, 64, 32, 128),
    ConvShape(128, 128, 16, 128),
    ConvShape(256, 256, 8, 128),
    ConvShape(512, 512, 4, 128),
    LinearShape(1024, 1024, 512),
    LinearShape(4096, 1024, 512),
    LinearShape(1024, 4096, 512),
)
