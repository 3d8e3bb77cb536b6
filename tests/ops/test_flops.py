"""FlopCounterMode counts 2 operations per kept weight and position, forward and for each gradient."""

from __future__ import annotations

import torch
from op_cases import sparse_matrix
from torch.utils.flop_counter import FlopCounterMode

from grasp_sparse.ops import csr_conv2d, csr_linear


def _counts(function) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op).removeprefix("grasp_sparse."): count for op, count in counter.get_flop_counts()["Global"].items()}


def test_linear():
    values, indices, _ = sparse_matrix(24, 40, 0.2, torch.float32)
    x, values = torch.randn(2, 5, 40, requires_grad=True), values.requires_grad_()
    expected = 2 * indices.nnz * 10
    counts = _counts(lambda: csr_linear(x, values, indices).sum().backward())
    assert counts == {"csr_spmm": expected, "csr_spmm_backward": 2 * expected}
    frozen = _counts(lambda: csr_linear(x, values.detach(), indices).sum().backward())
    assert frozen == {"csr_spmm": expected, "csr_spmm_t": expected}
    first = _counts(lambda: csr_linear(x.detach(), values, indices).sum().backward())
    assert first == {"csr_spmm": expected, "csr_spmm_backward": expected}


def test_conv2d():
    values, indices, _ = sparse_matrix(6, 36, 0.2, torch.float32)
    x, values = torch.randn(5, 4, 9, 8, requires_grad=True), values.requires_grad_()
    expected = 2 * indices.nnz * 5 * 5 * 8  # stride 2 vertically: 9 rows give 5

    def counts(x, values):
        return _counts(lambda: csr_conv2d(x, values, indices, None, (3, 3), (2, 1), (1, 1, 1, 1)).sum().backward())

    assert counts(x, values) == {"csr_conv2d_fprop": expected, "csr_conv2d_backward": 2 * expected}
    assert counts(x, values.detach()) == {"csr_conv2d_fprop": expected, "csr_conv2d_dgrad": expected}
    assert counts(x.detach(), values) == {"csr_conv2d_fprop": expected, "csr_conv2d_wgrad": expected}
