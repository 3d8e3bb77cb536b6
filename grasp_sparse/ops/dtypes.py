"""What the operations compute in: bfloat16 and float16 are ways to store activations, not to compute."""

from __future__ import annotations

import torch


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of values, bias and their gradients beside activations of this dtype."""
    return torch.float32 if activations in (torch.bfloat16, torch.float16) else activations
