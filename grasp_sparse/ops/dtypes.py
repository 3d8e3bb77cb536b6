"""What the operations compute in: bfloat16 and float16 are ways to store activations, not to compute."""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once: of a device that autocast does not know (meta) it must not be asked, and not every torch.compile traces the question.
_AUTOCAST = frozenset(device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device))


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of values, bias and their gradients beside activations of this dtype."""
    return torch.float32 if activations in (torch.bfloat16, torch.float16) else activations


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast, where it is on, wants what is made of ``x``; None: that of the arguments. float64 is left alone."""
    device = x.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None
