"""Cases of the operations on weights of whole blocks, and what is compared with the float64 reference in each.

Shared by all that computes them: kernels on a device, kernels under an interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from op_cases import IMAGE_LAYOUTS, ROW_LAYOUTS, WINDOWS, block_matrix, close, same_layout_or_ambiguous
from torch import Tensor

from grasp_sparse.formats import CsrIndices, gather_blocks
from grasp_sparse.ops import reference_blocks
from grasp_sparse.ops.dtypes import compute_dtype

Operation = Callable[..., Tensor]


class LinearCase(NamedTuple):
    tokens: int
    out_features: int
    in_features: int
    block_size: tuple[int, int]
    density: float = 0.5
    bias: bool = True
    relu: bool = False
    layout: str = "row-major"

    def __str__(self) -> str:
        return f"{self.tokens}x{self.in_features}->{self.out_features}-" + _traits(self)


class ConvCase(NamedTuple):
    window: str
    batch: int
    in_channels: int
    out_channels: int
    block_size: tuple[int, int]
    density: float = 0.4
    bias: bool = True
    relu: bool = False
    layout: str = "channels_last"

    def __str__(self) -> str:
        return f"{self.window}-{self.batch}x{self.in_channels}->{self.out_channels}-" + _traits(self)


def _traits(case: LinearCase | ConvCase) -> str:
    flags = "".join(f"-{name}" for name in ("bias", "relu") if getattr(case, name))
    return f"{'x'.join(map(str, case.block_size))}-density{case.density}-{case.layout}{flags}"


def check_linear(operation: Callable[[str], Operation], case: LinearCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """The three products of ``operation(name)`` equal the reference, in the layout of what came in."""
    lay, promised = ROW_LAYOUTS[case.layout]
    shape = case.out_features, case.in_features
    values, indices, bias = _weight(case, shape, dtype)
    x, g = (torch.randn(case.tokens, of).to(dtype) for of in reversed(shape))
    check = _checker(operation, device, promised, str(case))
    check("bsr_spmm", (values, *indices, bias), (x,), (case.out_features, case.relu), lay)
    check("bsr_spmm_t", (values, *indices), (g,), (case.in_features,), lay)
    check("bsr_sddmm", tuple(indices), (g, x), (case.block_size,), lay)


def check_conv2d(operation: Callable[[str], Operation], case: ConvCase, dtype: torch.dtype, device: str = "cpu") -> None:
    lay, promised = IMAGE_LAYOUTS[case.layout]
    kernel, *geometry, image = WINDOWS[case.window]
    values, indices, bias = _weight(case, (case.out_channels, case.in_channels, *kernel), dtype)
    x = torch.randn(case.batch, case.in_channels, *image).to(dtype)
    empty = torch.empty(case.batch, case.in_channels, *image, device="meta")
    meta = [t.to("meta") for t in (values, *indices)]
    size = torch.ops.grasp_sparse.bsr_conv2d_fprop(*meta, None, empty, case.out_channels, kernel, *geometry).shape
    g = torch.randn(size).to(dtype)
    check = _checker(operation, device, promised, str(case))
    check("bsr_conv2d_fprop", (values, *indices, bias), (x,), (case.out_channels, kernel, *geometry, case.relu), lay)
    check("bsr_conv2d_dgrad", (values, *indices), (g,), (case.in_channels, image, kernel, *geometry), lay)
    check("bsr_conv2d_wgrad", tuple(indices), (g, x), (case.block_size, kernel, *geometry), lay)


def _weight(case: LinearCase | ConvCase, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, CsrIndices, Tensor | None]:
    """Values that the activations' dtype can hold, and nan where a block reaches past the weight."""
    values, indices = block_matrix(shape, case.block_size, case.density, torch.float32)
    outside = ~gather_blocks(torch.ones(shape, dtype=torch.bool), indices, case.block_size)
    values = values.to(dtype).to(compute_dtype(dtype)).masked_fill(outside, float("nan"))
    return values, indices, torch.randn(shape[0]) if case.bias else None


def _checker(operation: Callable[[str], Operation], device: str, promised: Callable[[Tensor], bool], case: str):
    def check(name: str, weights: tuple, activations: tuple[Tensor, ...], rest: tuple, lay: Callable[[Tensor], Tensor]) -> None:
        exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in (*weights, *activations)]
        expected = getattr(reference_blocks, name)(*exact, *rest)
        given = [lay(a.to(device)) for a in activations]
        moved = [t if t is None else t.to(device) for t in weights]
        result = operation(name)(*moved, *given, *rest)
        what = f"{name}, {case}, {given[0].dtype}"
        close(result.cpu(), expected, what)
        if "sddmm" in name or "wgrad" in name:
            assert result.dtype == compute_dtype(given[0].dtype) and result.is_contiguous(), what
        else:
            assert result.dtype == given[0].dtype and same_layout_or_ambiguous(given[0], result, promised), what
        again = operation(name)(*moved, *given, *rest)
        assert torch.equal(result, again), f"{what}: other bits at a second call"

    return check
