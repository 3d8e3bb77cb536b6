"""Lists of weights so long that threads write them together: the same bits as of one thread, and indices checked to the last."""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, block_matrix, close, sparse_matrix
from torch import Tensor

from grasp_sparse.formats import CsrIndices
from grasp_sparse.ops import reference, reference_blocks

ops = torch.ops.grasp_sparse
pytestmark = pytest.mark.skipif(not COMPILED, reason="the reference has no lists")
FEWEST = 3 * 16384  # weights of a list that three threads write
SIZES = {  # kernel, stride, padding, dilation; images; their results
    "stride 1": ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], [6, 5], [6, 5]),
    "stride 2": ([3, 3], [2, 2], [1, 1, 1, 1], [1, 1], [6, 5], [3, 3]),
    "bands in a ring": ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], [40, 12], [40, 12]),  # which have several lists of places
}
PASSES = ("convolution", "input gradient", "both gradients", "convolution of blocks", "input gradient of blocks")
CASES = ("transposed product", "both gradients", *(f"{name}, {size}" for name in PASSES for size in SIZES))
# The indices that threads look through while they write lists.
CHECKED = {
    "convolution": ("col_indices",),
    "convolution of blocks": ("col_indices",),
    "both gradients": ("col_indices", "row_indices", "permutation"),
}


def _call(case: str, dtype: torch.dtype) -> tuple:
    """Name and arguments of an operation: values, indices and the rest."""
    name, _, size = case.partition(", ")
    if not size:
        values, indices, _ = sparse_matrix(300, 400, 0.5, dtype)
        assert indices.nnz > FEWEST
        if name == "transposed product":
            return "csr_spmm_t", values, indices, torch.randn(20, 300, dtype=dtype)
        return "csr_spmm_backward", values, indices, torch.randn(600, 300, dtype=dtype), torch.randn(600, 400, dtype=dtype)
    *window, image, result = SIZES[size]
    if "blocks" in name:
        values, indices = block_matrix((180, 160, 3, 3), (2, 2), 0.9, dtype)
        x, g, sizes = torch.randn(3, 160, *image, dtype=dtype), torch.randn(3, 180, *result, dtype=dtype), (180, 160)
    else:
        values, indices, _ = sparse_matrix(80, 90 * 9, 0.9, dtype)
        x, g, sizes = torch.randn(17, 90, *image, dtype=dtype), torch.randn(17, 80, *result, dtype=dtype), ()
    assert indices.nnz > FEWEST
    kind = "bsr" if sizes else "csr"
    return {
        "convolution": (f"{kind}_conv2d_fprop", values, indices, None, x, *sizes[:1], *window),
        "input gradient": (f"{kind}_conv2d_dgrad", values, indices, g, *sizes[1:], image, *window),
        "both gradients": (f"{kind}_conv2d_backward", values, indices, g, x, *window),
    }[name.removesuffix(" of blocks")]


def _run(family, name: str, values: Tensor, indices: CsrIndices, *rest) -> tuple[Tensor, ...]:
    found = getattr(family, name)(values, *indices, *rest)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_for_any_number_of_threads(case: str, dtype: torch.dtype) -> None:
    call = _call(case, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [_run(ops, *call) for _ in range(2)]  # the second time the lists lie where they were
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    name, values, indices, *rest = call
    exact = [argument.double() if isinstance(argument, Tensor) else argument for argument in rest]
    family = reference_blocks if name.startswith("bsr") else reference
    for got, wanted in zip(results[0], _run(family, name, values.double(), indices, *exact), strict=True):
        close(got, wanted, case)


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("case", CASES)
def test_every_part_is_checked(case: str, place: int) -> None:
    torch.set_num_threads(2)
    name, values, indices, *rest = _call(case, torch.float32)
    for index in CHECKED.get(case.partition(", ")[0], ("row_indices", "permutation")):
        wrong = getattr(indices, index).clone()
        wrong[place] = 2**30
        with pytest.raises(RuntimeError, match="corrupt"):
            _run(ops, name, values, indices._replace(**{index: wrong}), *rest)
