"""What holds for any call of an operation, its arguments given by their names in the schema: see random_cases.py for such."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from op_cases import close
from torch import Tensor

from grasp_sparse.ops import reference, reference_blocks, reference_pool
from grasp_sparse.ops.schema import BLOCK_SCHEMAS, POOL_SCHEMAS

ops = torch.ops.grasp_sparse


def arguments_of(name: str, available: dict) -> list:
    """In the order of the schema."""
    return [available[argument.name] for argument in getattr(ops, name).default._schema.arguments]


def results_of(result: Tensor | None | Sequence[Tensor | None]) -> list[Tensor | None]:
    return [result] if result is None or isinstance(result, Tensor) else list(result)


def in_float64(available: dict) -> dict:
    """The same numbers elsewhere, in the strides that they have."""

    def exact(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        whole = value.new_empty(0).set_(value.untyped_storage())  # value.double() would close its gaps
        return whole.to(torch.float64, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: exact(value) for name, value in available.items()}


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """The same strides, where a stride means anything."""
    return a.numel() == 0 or all(s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)


def check_against_reference(names: list[str], available: dict) -> None:
    exact = in_float64(available)
    for name in names:
        actual = results_of(getattr(ops, name)(*arguments_of(name, available)))
        module = reference_blocks if name in BLOCK_SCHEMAS else reference_pool if name in POOL_SCHEMAS else reference
        expected = results_of(getattr(module, name)(*arguments_of(name, exact)))
        for got, want in zip(actual, expected, strict=True):
            assert (got is None) == (want is None), name
            if got is not None:
                close(got, want, name)
                assert lie_alike(got, want), f"{name}: strides {got.stride()}, expected {want.stride()}"


def check_threads(names: list[str], available: dict) -> None:
    for name in names:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(results_of(getattr(ops, name)(*arguments_of(name, available))))
        torch.set_num_threads(1)
        for one, two in zip(*results, strict=True):
            assert one is None or (one.shape == two.shape and torch.allclose(one, two, 0, 0, equal_nan=True)), name
