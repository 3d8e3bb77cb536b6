"""The csr_* kernels on a device: the laws that the emulator checks on small shapes, at sizes that fill a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from csr_laws import STORED, check_conv, check_linear, on
from op_cases import IMAGE_LAYOUTS, ROW_LAYOUTS, WINDOWS, close, examples, operation, sparse_matrix

from grasp_sparse.ops import reference
from grasp_sparse.ops.schema import SCHEMAS

pytestmark = pytest.mark.gpu

ops = torch.ops.grasp_sparse
CALLS = [name for name in examples() if name.partition(",")[0] in SCHEMAS]
dtypes = pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)


@pytest.fixture(autouse=True)
def compiled():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grasp_sparse::csr_spmm", "CUDA"):
        pytest.fail("the CUDA kernels are not built: FORCE_CUDA=1 pip install --no-build-isolation .")


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 5), (1, 19), (130, 257), (1000, 1024)], ids=str)
@dtypes
def test_linear_family(dtype, shape, layout):
    for batch, density in ((1, 0.5), (33, 0.1), (256, 0.05), (1000, 0.02)):
        check_linear(ops, dtype, shape, batch, density, layout, "cuda")


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@dtypes
def test_conv_family(dtype, window, layout):
    check_conv(ops, dtype, window, 17, 35, 33, 0.2, layout, "cuda")


@pytest.mark.parametrize("size", [(64, 64, 56), (256, 128, 28), (512, 512, 14)], ids=str)
@dtypes
def test_conv_family_at_the_sizes_of_networks(dtype, size):
    channels, filters, side = size
    window = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (side, side))
    check_conv(ops, dtype, window, channels, filters, 16, 0.03, "CHWN", "cuda")
    strided = ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (side, side))
    check_conv(ops, dtype, strided, channels, filters, 16, 0.03, "channels_last", "cuda")


def _on_device(arguments) -> tuple:
    """The same arguments, still asking for the gradients that they asked for."""
    return tuple(a.detach().cuda().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(operation(call).default, _on_device(examples(dtype)[call]))


@pytest.mark.parametrize("call", CALLS)
def test_gradients(call):
    assert torch.autograd.gradcheck(operation(call), _on_device(examples()[call]), atol=1e-6)


@dtypes
def test_the_same_bits_on_every_run(dtype):
    values, indices, _ = sparse_matrix(512, 1024, 0.05, torch.float64 if dtype == torch.float64 else torch.float32)
    values, indices = values.cuda(), on("cuda", indices)
    x, g = torch.randn(1024, 2048, device="cuda").t().to(dtype), torch.randn(512, 2048, device="cuda").t().to(dtype)
    first = ops.csr_spmm_backward(values, *indices, g, x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, ops.csr_spmm_backward(values, *indices, g, x), strict=True))


def test_captured_in_a_graph():
    """No host waits for a kernel, so a step can be captured; values that change in place are seen at the next replay."""
    values, indices, mask = sparse_matrix(96, 128, 0.1, torch.float32)
    values, indices, x = values.cuda(), on("cuda", indices), torch.randn(128, 64, device="cuda").t()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.csr_spmm(values, *indices, None, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.csr_spmm(values, *indices, None, x)
    values.copy_(torch.randn_like(values))
    graph.replay()
    close(y.cpu(), reference.csr_spmm(values.double().cpu(), *on("cpu", indices), None, x.double().cpu()))
    assert mask.shape == (96, 128)


def test_an_index_out_of_place_is_nan_and_nothing_else():
    values, indices, _ = sparse_matrix(64, 96, 0.2, torch.float32)
    corrupt = copy.deepcopy(indices)
    corrupt.col_indices[3], corrupt.row_indices[5] = 2**30, -1
    x, g = torch.randn(96, 40, device="cuda").t(), torch.randn(64, 40, device="cuda").t()
    assert ops.csr_spmm(values.cuda(), *on("cuda", corrupt), None, x).isnan().any()
    assert ops.csr_spmm_t(values.cuda(), *on("cuda", corrupt), g).isnan().any()
    assert ops.csr_sddmm(*on("cuda", corrupt), g, x).isnan().any()
    torch.cuda.synchronize()


@pytest.mark.large
def test_more_than_32_bits_of_elements():
    """Activations of more than 2^31 elements, in and out: the last tokens are where 32-bit places would be wrong."""
    features, tokens = 256, 2**23 + 40
    if torch.cuda.get_device_properties(0).total_memory < 4 * features * tokens * 2:
        pytest.skip("needs 18 GB of memory")
    values, indices, _ = sparse_matrix(features, features, 0.02, torch.float32)
    v, gpu = values.cuda(), on("cuda", indices)
    x = torch.randn(features, tokens, device="cuda", dtype=torch.bfloat16).t()
    y = ops.csr_spmm(v, *gpu, None, x)
    for part in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        close(y[part].cpu(), reference.csr_spmm(values.double(), *indices, None, x[part].cpu().double()))
    dx = ops.csr_spmm_t(v, *gpu, y)
    close(dx[-64:].cpu(), reference.csr_spmm_t(values.double(), *indices, y[-64:].cpu().double()))
    del dx
    # A gradient that is zero but for the last tokens: what the sum over all of them must be.
    g = torch.zeros_like(y)
    g[-64:] = y[-64:]
    close(ops.csr_sddmm(*gpu, g, x).cpu(), reference.csr_sddmm(*indices, g[-64:].cpu().double(), x[-64:].cpu().double()))


@pytest.mark.large
def test_convolutions_of_more_than_32_bits_of_elements():
    """As above, with images: those at the end are right, and their gradients."""
    channels, side = 64, 64
    batch = 2**31 // (channels * side * side) + 40
    if torch.cuda.get_device_properties(0).total_memory < 5 * batch * channels * side * side * 2:
        pytest.skip("needs 22 GB of memory")
    values, indices, _ = sparse_matrix(channels, channels * 9, 0.02, torch.float32)
    v, gpu, place = values.cuda(), on("cuda", indices), ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    x = torch.randn(channels, side, side, batch, device="cuda", dtype=torch.bfloat16).permute(3, 0, 1, 2)
    y = ops.csr_conv2d_fprop(v, *gpu, None, x, *place)
    for part in (slice(0, 2), slice(batch // 2, batch // 2 + 2), slice(batch - 2, batch)):
        close(y[part].cpu(), reference.csr_conv2d_fprop(values.double(), *indices, None, x[part].cpu().double(), *place))
    dx = ops.csr_conv2d_dgrad(v, *gpu, y, (side, side), *place)
    close(dx[-2:].cpu(), reference.csr_conv2d_dgrad(values.double(), *indices, y[-2:].cpu().double(), (side, side), *place))
    del dx
    ends = y[-2:].clone()
    y.zero_()
    y[-2:] = ends
    wanted = reference.csr_conv2d_wgrad(*indices, ends.cpu().double(), x[-2:].cpu().double(), *place)
    torch.testing.assert_close(ops.csr_conv2d_wgrad(*gpu, y, x, *place).cpu().double(), wanted, rtol=1e-4, atol=1e-2)
