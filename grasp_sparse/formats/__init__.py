"""Index arithmetic of stored weights: which place each kept value belongs to. No kernels, no autograd."""

from grasp_sparse.formats.blocks import (
    block_grid,
    bsr_from_mask,
    from_blocks,
    gather_blocks,
    mask_from_bsr,
    scatter_blocks,
    to_blocks,
)
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
    "block_grid",
    "bsr_from_mask",
    "csr_from_indices",
    "csr_from_mask",
    "from_blocks",
    "gather_blocks",
    "gather_values",
    "mask_from_bsr",
    "mask_from_csr",
    "scatter_blocks",
    "scatter_values",
    "to_blocks",
]
