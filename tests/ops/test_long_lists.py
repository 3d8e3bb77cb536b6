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
WINDOWS = {"stride 1": ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1]), "stride 2": ([3, 3], [2, 2], [1, 1, 1, 1], [1, 1])}
FEWEST = 3 * 16384  # enough for three threads


def _calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Name and arguments of operations with such lists, the values first and then the indices."""
    values, indices, _ = sparse_matrix(300, 400, 0.5, dtype)
    filters, filter_indices, _ = sparse_matrix(80, 90 * 9, 0.9, dtype)
    blocks, block_indices = block_matrix((180, 160, 3, 3), (2, 2), 0.9, dtype)
    assert min(indices.nnz, filter_indices.nnz, block_indices.nnz) > FEWEST
    rows, images = torch.randn(600, 400, dtype=dtype), torch.randn(17, 90, 6, 5, dtype=dtype)
    calls: dict[str, tuple] = {
        "transposed product": ("csr_spmm_t", values, indices, torch.randn(20, 300, dtype=dtype)),
        "both gradients": ("csr_spmm_backward", values, indices, torch.randn(600, 300, dtype=dtype), rows),
    }
    for name, window in WINDOWS.items():
        size = [6, 5] if name == "stride 1" else [3, 3]
        grads = torch.randn(17, 80, *size, dtype=dtype)
        calls[f"convolution, {name}"] = "csr_conv2d_fprop", filters, filter_indices, None, images, *window
        calls[f"input gradient, {name}"] = "csr_conv2d_dgrad", filters, filter_indices, grads, [6, 5], *window
        calls[f"both gradients, {name}"] = "csr_conv2d_backward", filters, filter_indices, grads, images, *window
        wide = torch.randn(3, 180, *size, dtype=dtype)
        calls[f"input gradient of blocks, {name}"] = "bsr_conv2d_dgrad", blocks, block_indices, wide, 160, [6, 5], *window
    return calls


CASES = tuple(_calls(torch.float32))


def _run(family, name: str, values: Tensor, indices: CsrIndices, *rest) -> tuple[Tensor, ...]:
    found = getattr(family, name)(values, *indices, *rest)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_for_any_number_of_threads(case: str, dtype: torch.dtype) -> None:
    call = _calls(dtype)[case]
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
@pytest.mark.parametrize("case", [case for case in CASES if "gradient" in case or "transposed" in case])
def test_every_part_is_checked(case: str, place: int) -> None:
    torch.set_num_threads(2)
    name, values, indices, *rest = _calls(torch.float32)[case]
    for index in ("row_indices", "permutation"):
        wrong = getattr(indices, index).clone()
        wrong[place] = 2**30
        with pytest.raises(RuntimeError, match="corrupt"):
            _run(ops, name, values, indices._replace(**{index: wrong}), *rest)
