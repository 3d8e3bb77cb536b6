"""Precisions of a measurement on a GPU, where "float32" alone says too little: cuDNN's convolutions take TF32 unless told not to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What activations are stored as. "tf32" is float32 in memory whose products round their factors to 10 bits.
STORAGE = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error relative to the largest value, against float64 on inputs rounded to what is stored. Tensor cores cut the factors of
# TF32 off behind 10 bits, each by up to 2^-10, so a product by up to 2e-3, most of them by about half: 1e-3 would refuse what is
# right. float32 is never compared with TF32 on.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 3e-2}


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside, products and convolutions of float32 tensors on CUDA use TF32 for "tf32" and full float32 otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
