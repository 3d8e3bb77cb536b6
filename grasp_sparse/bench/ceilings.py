"""What a device can do at most, measured: how many multiply-adds and bytes a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grasp_sparse.bench.precision import STORAGE, precision
from grasp_sparse.cuda_timing import device_times
from grasp_sparse.timing import interleaved


@dataclass(frozen=True)
class Ceilings:
    """flops: precision -> floating-point operations a second of a large dense product. bandwidth: bytes a second of a copy, read and
    written together."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, flops: float, size: float, precision: str, matrix: bool) -> float:
        """The least time for so many operations and bytes. Without `matrix` units the rate is that of float32, whatever is stored."""
        rate = self.flops[precision if matrix else "float32"]
        return max(flops / rate, size / self.bandwidth)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.flops.items())
        return f"this device: {rates}, {self.bandwidth / 1e9:.4g} GB/s"


def measure_ceilings(device: str) -> Ceilings:
    """Products of random square matrices and a copy far beyond the caches; small ones on the CPU."""
    size, elements = (8192, 1 << 28) if device == "cuda" else (512, 1 << 20)
    arms = {}
    for name, dtype in STORAGE.items():
        left, right = torch.randn(2, size, size, device=device).to(dtype)

        def product(left=left, right=right, name=name):
            with precision(name):
                return left @ right

        arms[name] = product
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    arms["copy"] = lambda: target.copy_(source)
    times = device_times(arms, 5) if device == "cuda" else interleaved(arms, 5)
    return Ceilings({name: 2 * size**3 / times[name].median for name in STORAGE}, 2 * source.nbytes / times["copy"].median)
