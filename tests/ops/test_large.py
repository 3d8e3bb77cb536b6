"""Where 32 bits end: activations whose entries lie further apart than that, and images that 32-bit places cannot reach."""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, block_matrix, close, sparse_matrix

from grasp_sparse.ops import reference, reference_blocks

ops = torch.ops.grasp_sparse
FAR = 2**31 + 8  # elements
WINDOW = ((3, 2), (1, 1), (1, 1, 0, 1), (1, 1))


@pytest.fixture(scope="module")
def far_apart(tmp_path_factory):
    """A function that gives a tensor of random numbers whose dimension `far` has a stride of FAR: a view of a file with holes."""
    path = tmp_path_factory.mktemp("far") / "holes"
    storage = torch.from_file(str(path), shared=True, size=FAR + 4096, dtype=torch.float32)

    def make(shape: tuple[int, ...], far: int) -> torch.Tensor:
        assert shape[far] == 2
        near = torch.randn(shape)
        strides = list(near.transpose(0, far).contiguous().transpose(0, far).stride())
        strides[far] = FAR
        return storage.as_strided(shape, strides).copy_(near)

    yield make
    path.unlink()


@pytest.mark.parametrize("far", [0, 1], ids=["rows", "features"])
def test_linear_family_on_far_strides(far_apart, far):
    shape = (2, 20) if far == 0 else (20, 2)
    values, indices, _ = sparse_matrix(7, shape[1], 0.5, torch.float32)
    transposed, their, _ = sparse_matrix(shape[1], 7, 0.5, torch.float32)
    g = torch.randn(shape[0], 7)
    x = far_apart(shape, far)
    near = x.double()
    close(ops.csr_spmm(values, *indices, None, x), reference.csr_spmm(values.double(), *indices, None, near))
    close(ops.csr_spmm_t(transposed, *their, x), reference.csr_spmm_t(transposed.double(), *their, near))
    close(ops.csr_sddmm(*indices, g, x), reference.csr_sddmm(*indices, g.double(), near))
    close(ops.csr_sddmm(*their, x, g), reference.csr_sddmm(*their, near, g.double()))


@pytest.mark.parametrize("far", [0, 1, 2, 3], ids=["batch", "channels", "rows", "columns"])
def test_conv_family_on_far_strides(far_apart, far):
    shape = tuple(2 if i == far else size for i, size in enumerate((3, 4, 6, 5)))
    values, indices, _ = sparse_matrix(7, shape[1] * 6, 0.5, torch.float32)
    transposed, their, _ = sparse_matrix(shape[1], 7 * 6, 0.5, torch.float32)
    x = far_apart(shape, far)
    near = x.double()
    y = reference.csr_conv2d_fprop(values.double(), *indices, None, near, *WINDOW)
    assert y.shape[2:] == x.shape[2:]
    close(ops.csr_conv2d_fprop(values, *indices, None, x, *WINDOW), y)
    g = torch.randn(y.shape)
    close(ops.csr_conv2d_wgrad(*indices, g, x, *WINDOW), reference.csr_conv2d_wgrad(*indices, g.double(), near, *WINDOW))
    dx = reference.csr_conv2d_dgrad(transposed.double(), *their, near, shape[2:], *WINDOW)
    close(ops.csr_conv2d_dgrad(transposed, *their, x, shape[2:], *WINDOW), dx)
    z = torch.randn(shape[0], 7, *shape[2:])
    close(ops.csr_conv2d_wgrad(*their, x, z, *WINDOW), reference.csr_conv2d_wgrad(*their, near, z.double(), *WINDOW))


@pytest.mark.parametrize("far", [0, 1, 2, 3], ids=["batch", "channels", "rows", "columns"])
def test_blocks_on_far_strides(far_apart, far):
    shape, block_size = tuple(2 if i == far else size for i, size in enumerate((3, 4, 6, 5))), (4, 3)
    values, indices = block_matrix((7, shape[1], *WINDOW[0]), block_size, 0.5, torch.float32)
    transposed, their = block_matrix((shape[1], 7, *WINDOW[0]), block_size, 0.5, torch.float32)
    x = far_apart(shape, far)
    near = x.double()
    y = reference_blocks.bsr_conv2d_fprop(values.double(), *indices, None, near, 7, *WINDOW)
    close(ops.bsr_conv2d_fprop(values, *indices, None, x, 7, *WINDOW), y)
    g = torch.randn(y.shape)
    dv = reference_blocks.bsr_conv2d_wgrad(*indices, g.double(), near, block_size, *WINDOW)
    close(ops.bsr_conv2d_wgrad(*indices, g, x, block_size, *WINDOW), dv)
    dx = reference_blocks.bsr_conv2d_dgrad(transposed.double(), *their, near, 7, shape[2:], *WINDOW)
    close(ops.bsr_conv2d_dgrad(transposed, *their, x, 7, shape[2:], *WINDOW), dx)


@pytest.mark.skipif(not COMPILED, reason="a limit of the kernels")
def test_an_image_that_32_bit_places_cannot_reach_is_refused():
    _, indices, _ = sparse_matrix(1, 1, 1.0)
    line = torch.ones(()).expand(1, 1, 1, 2**27)
    with pytest.raises(RuntimeError, match="narrower images or fewer channels"):
        ops.csr_conv2d_wgrad(*indices, line, line, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
