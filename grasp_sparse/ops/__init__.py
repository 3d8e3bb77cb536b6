"""Sparse operations: schemas, pure-torch reference, kernels in Triton, autograd, and the typed entry that layers call."""

from grasp_sparse.ops import schema  # isort: skip  (names the operations; the others register their part of each)
from grasp_sparse.ops import (
    autograd,
    autograd_blocks,
    fake,
    flops,
    reference,
    reference_blocks,
    reference_pool,
    reference_update,
    triton,
)
from grasp_sparse.ops.functional import bsr_conv2d, bsr_linear, csr_conv2d, csr_conv2d_batch_norm, csr_linear

__all__ = [
    "autograd",
    "autograd_blocks",
    "bsr_conv2d",
    "bsr_linear",
    "csr_conv2d",
    "csr_conv2d_batch_norm",
    "csr_linear",
    "fake",
    "flops",
    "reference",
    "reference_blocks",
    "reference_pool",
    "reference_update",
    "schema",
    "triton",
]
