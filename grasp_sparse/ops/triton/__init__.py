"""Kernels in Triton for weights of whole blocks; they take over on CUDA from the reference.

Blocks with sides of 16, 32, 64 or 128 (of which any two make a block), activations in float32, bfloat16 or float16, on devices of
compute capability 8.0 and above. Everything else the reference computes.

Kernels walk indices as they are: the lengths of all arguments are checked, what indices say is not, for that would be a wait for
the device in every call or a mask in every load. Layers have theirs from masks, or checkpoints that ``csr_from_indices`` checks.

Nothing of Triton is imported before a first CUDA tensor comes by, and where Triton is not installed nothing is registered.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch

from grasp_sparse.ops.schema import BLOCK_SCHEMAS


BLOCK_SIDES = (16, 32, 64, 128)
_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(block_size: Sequence[int]) -> str | None:
    """Why the reference computes with blocks of this size on CUDA; None where the kernels do."""
    if not _INSTALLED:
        return "Triton is not installed"
    if all(side in BLOCK_SIDES for side in block_size):
        return None
    return f"blocks {'x'.join(map(str, block_size))} have no kernel on cuda; sides of {', '.join(map(str, BLOCK_SIDES))} do"


def _run(name: str, *arguments):
    from grasp_sparse.ops.triton import kernels

    return kernels.run(name, *arguments)


if _INSTALLED:
    _library = torch.library.Library("grasp_sparse", "IMPL")
    for _name in BLOCK_SCHEMAS:
        _library.impl(_name, functools.partial(_run, _name), "CUDA")
