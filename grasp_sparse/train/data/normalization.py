"""From bytes as workers hand them over to what a model takes: on the device, normalised, in the run's layout, once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# How a tensor [N, C, H, W] lies in memory, outermost dimension first.
_ORDERS = {"nchw": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "chwn": (1, 2, 3, 0)}
LAYOUTS = tuple(_ORDERS)


def empty_in_layout(
    size: tuple[int, ...], layout: str, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uninitialised [N, C, H, W] in that layout: "nchw", "channels_last" or "chwn" (batch innermost)."""
    order = _ORDERS[layout]
    return torch.empty([size[d] for d in order], dtype=dtype, device=device).permute([order.index(d) for d in range(4)])


def in_layout(images: Tensor, layout: str) -> Tensor:
    """`images` [N, C, H, W] in that layout; as they are if they lie so already."""
    if images.permute(_ORDERS[layout]).is_contiguous():
        return images
    return empty_in_layout(images.shape, layout, images.device, images.dtype).copy_(images)


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor, device: str | torch.device, layout: str = "nchw") -> Tensor:
        """uint8 [N, C, H, W] -> float32 (x / 255 - mean) / std on `device`. Only bytes travel; pinned ones do not wait."""
        images = images.to(device, non_blocking=images.is_pinned())
        scale, offset = _scale_and_offset(self, torch.device(device))
        return empty_in_layout(images.shape, layout, device).copy_(images).mul_(scale).add_(offset)


@functools.lru_cache(maxsize=8)
def _scale_and_offset(pixels: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as one multiply and one add, [1, C, 1, 1] each; kept, since a copy to a GPU would make each batch wait."""
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (pixels.mean, pixels.std))
    return 1 / (255 * std), -mean / std
