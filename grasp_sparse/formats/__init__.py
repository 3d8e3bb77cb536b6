"""Index arithmetic of stored weights: which place each kept value belongs to. No kernels, no autograd."""

from grasp_sparse.formats.blocks import (
    block_extents,
    block_grid,
    bsr_from_mask,
    count_inside,
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
    is_consistent,
    mask_from_csr,
    scatter_values,
)
from grasp_sparse.formats.storage import Storage, storage_of, stored_block_size

__all__ = [
    "CsrIndices",
    "Storage",
    "block_extents",
    "block_grid",
    "bsr_from_mask",
    "count_inside",
    "csr_from_indices",
    "csr_from_mask",
    "from_blocks",
    "gather_blocks",
    "gather_values",
    "is_consistent",
    "mask_from_bsr",
    "mask_from_csr",
    "scatter_blocks",
    "scatter_values",
    "storage_of",
    "stored_block_size",
    "to_blocks",
]
