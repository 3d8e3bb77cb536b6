"""What operations give, seen while a step runs: the memory that is new with their results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    name: str  # "grasp_sparse::csr_spmm"
    images: list[tuple[int, tuple[int, ...]]]  # bytes and strides of its arguments of four dimensions
    outputs: list[int]  # bytes of the storages of its results that are none of its arguments'


class OperationOutputs(TorchDispatchMode):
    """Inside, ``calls`` takes up every operation, those of the backward pass too; a profiler sees the i-th as ``operation i``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with torch.profiler.record_function(f"operation {len(self.calls)}"):
            results = operation(*args, **(kwargs or {}))
        images = [(t.nbytes, t.stride()) for t in _tensors(args) if t.dim() == 4]
        given, new = _storages((args, kwargs)), _storages(results)
        self.calls.append(Call(operation.name(), images, [size for key, size in new.items() if size > 0 and key not in given]))
        return results


def _tensors(arguments: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _storages(arguments: object) -> dict[int, int]:
    """Bytes by storage."""
    storages = [tensor.untyped_storage() for tensor in _tensors(arguments)]
    return {storage._cdata: storage.nbytes() for storage in storages}
