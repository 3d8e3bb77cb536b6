"""Index arithmetic of stored weights: which place each kept value belongs to. No kernels, no autograd."""

from grasp_sparse.formats.csr import (
    CsrIndices,
    csr_from_indices,
    csr_from_mask,
    gather_values,
    mask_from_csr,
    scatter_values,
)

__all__ = [
    "CsrIndices",
    "csr_from_indices",
    "csr_from_mask",
    "gather_values",
    "mask_from_csr",
    "scatter_values",
]
