"""Numbers too small to be normal, which some processors take many times as long to multiply.

A step that is measured again and again trains on one batch, and in a network without 98 % of its weights gradients fade until they
are such numbers: on an Intel Xeon a dense ResNet-50 then took several times as long as in its first steps, and the sparse one as
long as before. That says nothing about sparsity, so steps are measured with those numbers taken for zero; `grasp-sparse train` takes
them for zero, too.
"""

from __future__ import annotations

import torch


def flush_denormals() -> str:
    """Takes denormal numbers for zero in this thread and those it starts from now on: before anything is computed in parallel.

    Returns what rows say of it, "zero", or "kept" where the processor cannot.
    """
    return "zero" if torch.set_flush_denormal(True) else "kept"
