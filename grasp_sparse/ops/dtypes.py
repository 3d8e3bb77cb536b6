"""What the operations compute in: bfloat16 is a way to store activations, not to compute."""

from __future__ import annotations

import torch


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of values, bias and their gradients beside activations of this dtype."""
    return torch.float32 if activations == torch.bfloat16 else activations
