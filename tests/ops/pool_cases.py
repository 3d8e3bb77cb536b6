"""Windows and images for the tests of max pooling."""

from __future__ import annotations

import torch
from op_cases import IMAGE_LAYOUTS

WINDOWS = {  # kernel, stride, padding, dilation, ceil_mode
    "2x2/2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "3x3/2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "3x3/2-ceil": ((3, 3), (2, 2), (1, 1), (1, 1), True),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "3x2/13-dilation21-ceil": ((3, 2), (1, 3), (1, 1), (2, 1), True),
    "3x3/3-dilation2-ceil": ((3, 3), (3, 3), (0, 0), (2, 2), True),
    "1x1/2": ((1, 1), (2, 2), (0, 0), (1, 1), False),
    "4x5/2-ceil": ((4, 5), (2, 2), (2, 2), (1, 1), True),
}
SHAPES = [(2, 3, 7, 9), (3, 20, 12, 41), (17, 2, 8, 8), (1, 1, 5, 5), (2, 33, 9, 2), (16, 16, 4, 4)]


def fits(shape, window) -> bool:
    kernel, _, padding, dilation, _ = window
    return all(size + 2 * p >= d * (k - 1) + 1 for size, k, p, d in zip(shape[2:], kernel, padding, dilation, strict=True))


CASES = [(window, shape) for window in WINDOWS for shape in SHAPES if fits(shape, WINDOWS[window])]


def picture(shape, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Half zeros, as behind a ReLU: windows with several largest values are common."""
    return IMAGE_LAYOUTS[layout][0](torch.randn(shape).relu().to(dtype)).detach().requires_grad_()
