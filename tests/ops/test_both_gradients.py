"""Many rows: both gradients of a linear layer come of one walk, over panels, columns left over and rows left over.

Of convolutions the tests of bands and of pixel lanes see to it.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, ROW_LAYOUTS, STORED, close, dense_matrix, sparse_matrix
from torch import Tensor

from grasp_sparse.ops.dtypes import compute_dtype

ops = torch.ops.grasp_sparse
SIZES = {  # rows, inputs, outputs
    "one row too few": (511, 40, 30),
    "whole panels": (512, 40, 30),
    "all kinds of rest": (703, 33, 50),
    "too few rows for so many outputs": (600, 9, 2100),
    "many outputs": (2051, 9, 2100),
    "one input": (1000, 1, 17),
}


def _arguments(size: tuple[int, int, int], dtype: torch.dtype, density: float = 0.2) -> tuple:
    rows, inputs, outputs = size
    values, indices, mask = sparse_matrix(outputs, inputs, density, compute_dtype(dtype))
    x, g, y = ((0.3 * torch.randn(rows, features)).to(dtype) for features in (inputs, outputs, outputs))
    return values, indices, mask, x, g, y


@pytest.mark.parametrize("gated", [False, True], ids=["", "behind a ReLU"])
@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_dense_formula(size, dtype, layout, gated):
    values, indices, mask, x, g, y = _arguments(size, dtype)
    g64 = g.double() * (y > 0) if gated else g.double()
    expected = (g64 @ dense_matrix(values.double(), mask), (g64.t() @ x.double())[mask].unsqueeze(0), g64.sum(0))
    lay, _ = ROW_LAYOUTS[layout]
    found = ops.csr_spmm_backward(values, *indices, lay(g), lay(x), lay(y) if gated else None)
    for got, wanted, name in zip(found, expected, ("dx", "dvalues", "dbias"), strict=True):
        close(got, wanted, name)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_same_bits_for_any_number_of_threads(size):
    values, indices, _, x, g, _ = _arguments(size, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.csr_spmm_backward(values, *indices, g, x))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_no_weights_at_all():
    values, indices, _, x, g, _ = _arguments((600, 20, 30), torch.float32, density=0)
    dx, dvalues, dbias = ops.csr_spmm_backward(values, *indices, g, x)
    assert dx.shape == x.shape and not dx.any() and dvalues.shape == (1, 0)
    close(dbias, g.double().sum(0))


def test_a_column_without_weights_does_not_read_x():
    values, indices, mask, x, g, _ = _arguments((600, 20, 30), torch.float32)
    unused = int((~mask.any(0)).nonzero()[0])
    x[:, unused] = torch.nan
    dx, dvalues, _ = ops.csr_spmm_backward(values, *indices, g, x)
    assert dvalues.isfinite().all() and not dx[:, unused].any()


@pytest.mark.skipif(not COMPILED, reason="the reference reads indices through torch's own checks")
@pytest.mark.parametrize("name", ["crow_indices", "col_indices", "ccol_indices", "row_indices", "permutation"])
@pytest.mark.parametrize("wrong", [-1, 2**30])
def test_corrupt_index_is_refused(name, wrong):
    values, indices, _, x, g, _ = _arguments((600, 20, 30), torch.float32)
    corrupt: Tensor = getattr(indices, name).clone()
    corrupt[3] = wrong
    with pytest.raises(RuntimeError, match="corrupt"):
        ops.csr_spmm_backward(values, *indices._replace(**{name: corrupt}), g, x)


@pytest.mark.skipif(not COMPILED, reason="the reference gathers through what it is given")
def test_a_permutation_that_leaves_out_weights_gives_them_nothing():
    """Not refused, as every entry is in range; but no memory that held something else is shown."""
    values, indices, _, x, g, _ = _arguments((1024, 20, 30), torch.float32)
    right = ops.csr_spmm_backward(values, *indices, g, x)[1][0, 1:]
    corrupt = indices._replace(permutation=torch.zeros_like(indices.permutation))
    dvalues = ops.csr_spmm_backward(values, *corrupt, g, x)[1][0, 1:]
    assert ((dvalues == 0) | (dvalues == right)).all()
