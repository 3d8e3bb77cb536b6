"""The CUDA kernels, run by the emulator, obey the laws of their operations: every type, layout, window and odd size."""

from __future__ import annotations

import ctypes

import pytest
import torch
from csr_laws import STORED, check_conv, check_linear
from op_cases import IMAGE_LAYOUTS, ROW_LAYOUTS, WINDOWS, close, sparse_matrix

from grasp_sparse.ops import reference
from grasp_sparse.poison import poisoned_memory

SHAPES = {"7x5": (7, 5), "1x1": (1, 1), "1x19": (1, 19), "33x1": (33, 1), "70x67": (70, 67)}
dtypes = pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@dtypes
def test_linear_family(emulated, dtype, shape):
    for batch, density in ((1, 1.0), (3, 0.1), (34, 0.1), (64, 1.0)):
        check_linear(emulated, dtype, shape, batch, density, "feature-major")


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@dtypes
def test_linear_family_in_every_layout(emulated, dtype, layout):
    check_linear(emulated, dtype, (9, 37), 40, 0.2, layout)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@dtypes
def test_conv_family(emulated, dtype, window):
    check_conv(emulated, dtype, window, channels=3, filters=5, batch=6, density=0.3, layout="CHWN")


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_conv_family_in_every_layout(emulated, layout, batch):
    check_conv(emulated, torch.float32, WINDOWS["3x3-stride2"], 3, 5, batch, 0.3, layout)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_kept(emulated, density):
    check_linear(emulated, torch.float32, (12, 20), 8, density, "feature-major")
    check_conv(emulated, torch.float32, WINDOWS["3x3"], 4, 6, 8, density, "CHWN")


def test_empty_batch_and_no_channels(emulated):
    check_linear(emulated, torch.float32, (3, 4), 0, 0.5, "row-major")
    check_linear(emulated, torch.float32, (0, 4), 3, 1.0, "row-major")
    check_linear(emulated, torch.float32, (3, 0), 3, 1.0, "row-major")
    check_conv(emulated, torch.float32, WINDOWS["3x3"], 2, 3, 0, 0.5, "NCHW")


# multiprocessors (more: smaller blocks, more shares), bytes of shared memory (fewer: more chunks of channels, smaller tiles)
DEVICES = {"one block at a time": (1, 200 << 10), "many small": (1000, 48 << 10), "little memory": (2, 26 << 10)}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_cutting(emulator, emulated, device, dtype):
    emulator.set_limits(*device)
    check_linear(emulated, dtype, (70, 150), 150, 0.1, "feature-major")
    check_conv(emulated, dtype, WINDOWS["3x3-stride2"], 20, 40, 36, 0.1, "CHWN")
    check_conv(emulated, dtype, ((3, 3), (1, 1), (9, 9, 9, 9), (9, 9), (7, 12)), 5, 6, 4, 0.3, "CHWN")


def test_wide_windows(emulator, emulated):
    emulator.set_limits(2, 26 << 10)
    check_conv(emulated, torch.float32, ((15, 13), (1, 1), (7, 7, 6, 6), (1, 1), (9, 9)), 2, 3, 5, 0.05, "CHWN")
    values, indices, _ = sparse_matrix(1, 200 * 200, 1.0, torch.float32)
    with pytest.raises(RuntimeError, match="leave this layer dense"):
        emulated.csr_conv2d_fprop(values, *indices, None, torch.ones(1, 1, 200, 200), (200, 200), (1, 1), (0,) * 4, (1, 1))


def test_results_are_the_same_bits(emulated):
    values, indices, _ = sparse_matrix(40, 60, 0.3, torch.float32)
    x, g = torch.randn(60, 130).t(), torch.randn(40, 130).t()
    first, second = (emulated.csr_spmm_backward(values, *indices, g, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=["inf", "nan"])
def test_only_what_a_weight_multiplies_counts(emulated, bad):
    """Weights are filled up to groups and tiles reach past the image: neither may drag a number in that no weight asks for."""
    values, indices, mask = sparse_matrix(20, 30, 0.2, torch.float32)
    x = torch.randn(30, 10).t()
    x[:, 3] = bad
    y = emulated.csr_spmm(values, *indices, None, x)
    assert torch.equal((~y.isfinite()).any(0), mask[:, 3])
    g = torch.randn(20, 10).t()
    g[:, 5] = bad
    dx, dv, _ = emulated.csr_spmm_backward(values, *indices, g, torch.randn(30, 10).t())
    assert torch.equal((~dx.isfinite()).any(0), mask[5])
    assert torch.equal(~dv.isfinite()[0], torch.arange(20).unsqueeze(1).expand(20, 30)[mask] == 5)

    kernel, stride, padding, dilation, image = WINDOWS["3x3-stride3-unseen-rest"]
    values, indices, _ = sparse_matrix(4, 27, 0.5, torch.float32)
    images = torch.randn(5, 3, *image)
    images[:, :, 6:], images[:, :, :, 9:] = bad, bad  # rows and columns that no output sees
    y = emulated.csr_conv2d_fprop(values, *indices, None, images, kernel, stride, padding, dilation)
    assert y.isfinite().all()
    assert emulated.csr_conv2d_wgrad(*indices, torch.randn_like(y), images, kernel, stride, padding, dilation).isfinite().all()


CORRUPT = {
    "last far too large": (-1, 2**30),
    "first negative": (0, -1),
    "middle negative": (2, -(2**30)),
    "middle too large": (2, 10_000),
}


@pytest.mark.parametrize("place, number", CORRUPT.values(), ids=CORRUPT)
@pytest.mark.parametrize("which", range(5), ids=["crow_indices", "col_indices", "ccol_indices", "row_indices", "permutation"])
def test_a_corrupt_index_reads_nothing_and_shows(emulated, which, place, number):
    """No kernel can raise without a wait; the rows it concerns are NaN, and the others are not wrong."""
    values, indices, _ = sparse_matrix(20, 30, 0.2, torch.float32)
    corrupt = [index.clone() for index in indices]
    corrupt[which][place] = number
    x, g = torch.randn(30, 10).t(), torch.randn(20, 10).t()
    if which < 2:
        y, wanted = emulated.csr_spmm(values, *corrupt, None, x), reference.csr_spmm(values.double(), *indices, None, x.double())
    else:
        y, wanted = emulated.csr_spmm_t(values, *corrupt, g), reference.csr_spmm_t(values.double(), *indices, g.double())
    emulated.csr_sddmm(*corrupt, g, x)
    wrong = y.isnan().any(0)
    if which in (1, 3, 4):
        assert wrong.any()
        close(y[:, ~wrong], wanted[:, ~wrong])


@pytest.mark.parametrize("row", [2, 7])
def test_a_row_of_several_lists_that_end_before_they_begin(emulated, row):
    """Rows are ranked by their weights, these by fewer than none: a place that nobody ranked holds what memory did, which is poison."""
    values, indices, _ = sparse_matrix(20, 8 * 9, 0.3, torch.float32)
    begins = indices.ccol_indices.clone()
    begins[row * 9], begins[row * 9 + 1 : row * 9 + 10] = 10**6, 0
    corrupt = indices.crow_indices, indices.col_indices, begins, indices.row_indices, indices.permutation
    g = torch.randn(20, 6, 6, 3).permute(3, 0, 1, 2)
    window = (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    wanted = reference.csr_conv2d_dgrad(values.double(), *indices, g.double(), *window)
    with poisoned_memory():
        dx = emulated.csr_conv2d_dgrad(values, *corrupt, g, *window)
    assert dx[:, row].isnan().all()
    right = [channel for channel in range(8) if abs(channel - row) > 1 and not dx[:, channel].isnan().any()]
    close(dx[:, right], wanted[:, right])


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("batch", [10, 300], ids=["one share", "several"])
def test_sums_that_no_row_has_are_nan_whatever_memory_held(emulator, emulated, batch):
    values, indices, _ = sparse_matrix(20, 30, 0.2, torch.float32)
    g, x = torch.randn(20, batch), torch.randn(30, batch)
    wanted = reference.csr_sddmm(*indices, g.t().double(), x.t().double())[0]
    crow, nnz = indices.crow_indices.clone(), wanted.numel()
    crow[0], crow[-1] = 1, nnz - 2
    sums = torch.full((nnz,), 7.0)
    index = _pointer(crow), _pointer(indices.col_indices)
    emulator.sample_into(20, 30, nnz, *index, ctypes.c_int64(batch), *map(_pointer, (g, x, sums)))
    assert torch.equal(sums.isnan().nonzero()[:, 0], torch.tensor([0, nnz - 2, nnz - 1]))
    close(sums[1:-2], wanted[1:-2])


@pytest.mark.parametrize("rows, tiles", [(64, 2), (300, 10), (17, 3), (5, 5), (3, 8)])
def test_rows_are_dealt_so_that_tiles_have_as_many_weights(emulator, rows, tiles):
    """A few rows with most of the weights, all at the beginning: in their own order the first tile would have nearly everything."""
    counts = (4000 / torch.arange(1, rows + 1) ** 1.5).int()
    pointers, slots = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int())), -(-rows // tiles)
    dealt = torch.empty(tiles, slots, dtype=torch.int32)
    emulator.deal_rows(_pointer(pointers), rows, tiles, slots, _pointer(dealt))
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(rows))
    totals = torch.where(dealt < 0, 0, counts[dealt.clamp(min=0).long()]).sum(1)
    assert totals.max() - totals.min() <= counts.max()  # no row can be cut


def test_wrong_arguments_are_refused(emulated):
    values, indices, _ = sparse_matrix(6, 10, 0.5, torch.float32)
    x, g = torch.randn(4, 10), torch.randn(4, 6)
    for call in (
        lambda: emulated.csr_spmm(values, *indices, None, x[:, :-1]),
        lambda: emulated.csr_spmm(values.double(), *indices, None, x),
        lambda: emulated.csr_spmm(values[:, :-1], *indices, None, x),
        lambda: emulated.csr_spmm(values, *indices, torch.zeros(5), x),
        lambda: emulated.csr_spmm(values, *(index.long() for index in indices), None, x),
        lambda: emulated.csr_spmm(values, *indices, None, x.int()),
        lambda: emulated.csr_spmm_t(values, *indices, g[:, :-1]),
        lambda: emulated.csr_sddmm(*indices, g[:-1], x),
        lambda: emulated.csr_sddmm(*indices._replace(ccol_indices=torch.zeros(1, dtype=torch.int32)), g, x[:, :0]),
        lambda: emulated.csr_sddmm(*indices, g.double(), x),
        lambda: emulated.csr_spmm_backward(values, *indices, g, x, g[:, :-1]),
        lambda: emulated.csr_conv2d_fprop(values, *indices, None, x[:, :, None, None], [2, 2], [1, 1], [0] * 4, [1, 1]),
        lambda: emulated.csr_conv2d_fprop(values, *indices, None, x[:, :, None, None], [1, 1], [0, 1], [0] * 4, [1, 1]),
        lambda: emulated.csr_conv2d_fprop(values, *indices, None, x[:, :, None, None], [1, 1], [1, 1], [2**31] * 4, [1, 1]),
        lambda: emulated.csr_conv2d_dgrad(values, *indices, g[:, :, None, None], [2, 1], [1, 1], [1, 1], [0] * 4, [1, 1]),
    ):
        with pytest.raises(RuntimeError, match="Expected"):
            call()
