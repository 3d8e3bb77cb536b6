"""What a run ran on: versions, processor, kernels, threads, allocator. Goes into every result and into `info`."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grasp_sparse.allocator import allocator


def cpu_model() -> str:
    """The processor as the kernel tells it, or the architecture.

    With family and model where there are such: virtual machines often call processors of different generations by one name,
    and neither measured times nor what was decided by them hold from one to the other.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    name = told.get("model name") or platform.machine()
    generation = [f"{short} {told[key]}" for key, short in (("cpu family", "family"), ("model", "model")) if told.get(key)]
    return f"{name} ({' '.join(generation)})" if generation else name


# By which torch's own kernels are kept from instructions that the processor has, as GRASP_SPARSE_ISA keeps those of this package.
_LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def instruction_limits() -> str | None:
    """What dense kernels may not use: "ONEDNN_MAX_CPU_ISA=AVX2 …" as the environment says it; None without limits."""
    return " ".join(f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)) or None


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def extension_status() -> dict[str, Any]:
    """Whether the compiled kernels are there (`loaded`), why not (`reason`), which instruction set runs (`isa`), `built`."""
    from grasp_sparse import _extension

    status = _extension.status()
    return dataclasses.asdict(status) if dataclasses.is_dataclass(status) else dict(status)


def describe_environment() -> dict[str, Any]:
    """Plain values only, so that it can be stored as JSON and in a checkpoint."""
    kernels = extension_status()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion otherwise, which a safe load refuses
        "torchvision": version_of("torchvision"),
        "grasp_sparse": version_of("grasp_sparse"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": "pure-torch reference" if kernels["isa"] == "reference" else kernels["isa"],
        "instruction_limits": instruction_limits(),
        "allocator": allocator(),
    }
