"""The operations on weights of whole blocks on a CUDA device: equal to the float64 reference, the same bits at every run and with
every tile, beyond 2^31 elements, in CUDA graphs, without waiting for the device, and under autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from block_cases import ConvCase, LinearCase, check_conv2d, check_linear
from op_cases import CALLS, IMAGE_LAYOUTS, ROW_LAYOUTS, WINDOWS, block_matrix, close, examples, operation
from torch import Tensor

from grasp_sparse.formats import block_grid, csr_from_mask
from grasp_sparse.ops import reference_blocks
from grasp_sparse.ops.schema import BLOCK_SCHEMAS

pytestmark = pytest.mark.gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDES = (16, 32, 64, 128)
OTHER_BLOCKS = ((8, 8), (48, 16), (7, 5))  # the reference's
# Of bfloat16 every block; of the others those between which a kernel is cut differently.
FEWER = [*zip(SIDES, SIDES, strict=True), (128, 16), (16, 128)]
LINEAR = [
    *product((torch.bfloat16,), [*product(SIDES, SIDES), *OTHER_BLOCKS]), *product((torch.float32, torch.float16), FEWER)
]  # fmt: skip
CONV_BLOCKS = (*FEWER, (32, 64))
TUNED = ((16, 16), (64, 64), (128, 128), (16, 128))
CONV2D = [
    (turn, window, dtype)
    for turn, (window, dtype) in enumerate(product(WINDOWS, DTYPES.values()))
    if dtype == torch.bfloat16 or turn % 2  # the two others in turns
]
ops = torch.ops.grasp_sparse


def readable(argument) -> str:
    return "x".join(map(str, argument)) if isinstance(argument, tuple) else str(argument).removeprefix("torch.")


def op(name: str):
    return getattr(ops, name)


@pytest.fixture(autouse=True)
def exact_and_poisoned():
    """float32 is float32; what torch.empty gives on the device is nan until it is written, which torch does in this mode."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.allow_tf32 = conv.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    matmul.allow_tf32, conv.allow_tf32 = before
    torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])


@pytest.fixture
def first_tile(monkeypatch):
    """What a kernel computes does not depend on its tile, which test_same_bits… shows; compiling them all would take an hour."""
    from grasp_sparse.ops.triton import launch

    monkeypatch.setattr(launch, "fastest", lambda key, tiles, run, device: tiles[0])


@pytest.mark.parametrize("dtype, size", LINEAR, ids=readable)
def test_linear_equals_reference(first_tile, dtype, size):
    """All with bias and ReLU, so that a size is compiled once; without them below."""
    for case in (
        LinearCase(300, 200, 330, size, 0.3, relu=True),
        LinearCase(1000, 256, 512, size, 0.2, relu=True),
        LinearCase(1, 129, 131, size, 1.0, relu=True),
        LinearCase(77, 64, 128, size, 0.0, relu=True),
        LinearCase(0, 64, 64, size, relu=True),
    ):
        check_linear(op, case, dtype, "cuda")


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_in_every_layout(first_tile, dtype, layout):
    check_linear(op, LinearCase(130, 96, 160, (32, 32), layout=layout, bias=False), dtype, "cuda")


@pytest.mark.parametrize("turn, window, dtype", CONV2D, ids=readable)
def test_conv2d_equals_reference(first_tile, turn, window, dtype):
    """Each window with one block, each block with windows of every kind; ragged channels, and those of whole blocks."""
    size, relu = CONV_BLOCKS[turn % len(CONV_BLOCKS)], turn % 2 == 0
    for batch, in_channels, out_channels in ((5, 2 * size[1], 128), (3, 67, 45)):
        check_conv2d(op, ConvCase(window, batch, in_channels, out_channels, size, 0.3, relu=relu, bias=relu), dtype, "cuda")


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_conv2d_in_every_layout(first_tile, dtype, layout):
    for window in ("1x1", "3x3"):
        check_conv2d(op, ConvCase(window, 4, 48, 40, (16, 32), layout=layout), dtype, "cuda")


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (32, 128), (8, 8)], ids=str)
def test_tf32_where_torch_may_use_it(first_tile, size):
    """Not the float32 result, and within 2^-10 of it relative to what was summed."""
    torch.backends.cuda.matmul.allow_tf32 = True
    values, indices = block_matrix((256, 512), size, 0.3, torch.float32)
    x = torch.randn(300, 512)
    y = ops.bsr_spmm(values.cuda(), *(i.cuda() for i in indices), None, x.cuda(), 256).cpu().double()
    exact = reference_blocks.bsr_spmm(values.double(), *indices, None, x.double(), 256)
    summed = reference_blocks.bsr_spmm(values.double().abs(), *indices, None, x.double().abs(), 256)
    assert ((y - exact).abs() <= 2**-10 * summed + 1e-6).all()
    assert ((y - exact).abs() > 2**-22 * summed).any()


def structure(weight_shape, size, flipped: bool) -> list[Tensor]:
    """The same at every call; flipped, as many blocks in other places."""
    kept = torch.rand(block_grid(weight_shape, size), generator=torch.Generator().manual_seed(1)) < 0.1
    return [i.cuda() for i in csr_from_mask(kept.flip(0, 1) if flipped else kept)]


def calls(dtype: torch.dtype, size: tuple[int, int], flipped: bool = False) -> dict[str, tuple]:
    """Of every operation on blocks, large enough to fill a device several times."""
    indices, filter_indices = structure((1024, 512), size, flipped), structure((256, 128, 3, 3), size, flipped)
    values, filters = (torch.randn(of[1].shape[0], *size, device="cuda") for of in (indices, filter_indices))
    x, g = torch.randn(5000, 512, device="cuda").to(dtype), torch.randn(5000, 1024, device="cuda").to(dtype)
    lay = IMAGE_LAYOUTS["channels_last"][0]
    images = lay(torch.randn(16, 128, 28, 27, device="cuda").to(dtype))
    grads = lay(torch.randn(16, 256, 14, 14, device="cuda").to(dtype))
    rest = [3, 3], [2, 2], [1, 1, 1, 1], [1, 1]
    return {
        "bsr_spmm": (values, *indices, torch.randn(1024, device="cuda"), x, 1024, True),
        "bsr_spmm_t": (values, *indices, g, 512),
        "bsr_sddmm": (*indices, g, x, size),
        "bsr_conv2d_fprop": (filters, *filter_indices, None, images, 256, *rest),
        "bsr_conv2d_dgrad": (filters, *filter_indices, grads, 128, [28, 27], *rest),
        "bsr_conv2d_wgrad": (*filter_indices, grads, images, size, *rest),
    }


@pytest.mark.parametrize(
    "dtype, size",
    [*product((torch.bfloat16,), TUNED), (torch.float32, (64, 64)), (torch.float16, (64, 64))],
    ids=readable,
)
def test_same_bits_at_every_run_and_with_every_tile(dtype, size):
    """Tuned as for anyone else, then with each tile that might have won."""
    from grasp_sparse.ops.triton import launch

    for name, arguments in calls(dtype, size).items():
        first = op(name)(*arguments)
        assert torch.equal(first, op(name)(*arguments)), name
        fastest, seen = launch.fastest, []
        try:
            launch.fastest = lambda key, tiles, run, device: seen.append(tiles) or tiles[0]
            op(name)(*arguments)
            for tile in seen[0]:
                launch.fastest = lambda key, tiles, run, device, tile=tile: tile
                assert torch.equal(first, op(name)(*arguments)), f"{name}, {tile}"
        finally:
            launch.fastest = fastest


def test_nothing_waits_for_the_device():
    """After the first call, which measures."""
    for name, arguments in calls(torch.float16, (64, 64)).items():
        op(name)(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            op(name)(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "not measured"])
def test_cuda_graphs_see_activations_and_indices_of_their_replay(measured, monkeypatch):
    from grasp_sparse.ops.triton import launch, tuning

    monkeypatch.setattr(tuning, "_chosen", {})

    def outside(name, arguments):
        with monkeypatch.context() as first_tile:
            if not measured:
                first_tile.setattr(launch, "fastest", lambda key, tiles, run, device: tiles[0])
            return op(name)(*arguments)

    others = calls(torch.float16, (32, 32), flipped=True)
    for name, arguments in calls(torch.float16, (32, 32)).items():
        outside(name, arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = op(name)(*arguments)
        for mine, other in zip(arguments, others[name], strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
        graph.replay()
        assert torch.equal(result, outside(name, others[name])), name
        assert bool(tuning._chosen) == measured


def needs_memory() -> None:
    """Of the device in all: were it what is free just now, these tests could be passed over because of others beside them."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 16 GB beside what other tests take")


FAR = 2**31 // 512 + 300  # tokens of 512 features


@pytest.mark.large
@pytest.mark.parametrize("name", ["bsr_spmm", "bsr_spmm_t", "bsr_sddmm"])
def test_linear_beyond_32_bit_offsets(first_tile, name):
    """Few features, many tokens: those at the end are right, and a gradient sees them."""
    needs_memory()
    values, indices = block_matrix((512, 512), (64, 64), 0.2, torch.float32)
    values = values.to(torch.bfloat16).float()
    moved = [i.cuda() for i in indices]
    x = torch.zeros(FAR, 512, dtype=torch.bfloat16, device="cuda")
    ends = torch.cat((torch.arange(40), torch.arange(FAR - 40, FAR)))
    x[ends.cuda()] = torch.randn(80, 512, device="cuda").to(x.dtype)
    near = x[ends.cuda()].cpu().double()
    if name == "bsr_sddmm":
        got = ops.bsr_sddmm(*moved, x, x, (64, 64)).cpu()
        close(got, reference_blocks.bsr_sddmm(*indices, near, near, (64, 64)))
    else:
        bias = (None,) if name == "bsr_spmm" else ()
        got = op(name)(values.cuda(), *moved, *bias, x, 512)[ends.cuda()].cpu()
        close(got, getattr(reference_blocks, name)(values.double(), *indices, *bias, near, 512))


@pytest.mark.large
@pytest.mark.parametrize("name", ["bsr_conv2d_fprop", "bsr_conv2d_dgrad", "bsr_conv2d_wgrad"])
def test_conv2d_beyond_32_bit_offsets(first_tile, name):
    needs_memory()
    batch, channels, image = 2**31 // (128 * 64 * 64) + 2, 128, (64, 64)
    values, indices = block_matrix((channels, channels, 3, 3), (64, 64), 0.3, torch.float32)
    values = values.to(torch.bfloat16).float()
    moved, rest = [i.cuda() for i in indices], ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    x = torch.zeros(batch, channels, *image, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    ends = [0, batch - 1]
    x[ends] = torch.randn(2, channels, *image, device="cuda").to(x.dtype)
    near = x[ends].cpu().double()
    if name == "bsr_conv2d_wgrad":
        got = ops.bsr_conv2d_wgrad(*moved, x, x, (64, 64), *rest).cpu()
        torch.testing.assert_close(
            got.double(), reference_blocks.bsr_conv2d_wgrad(*indices, near, near, (64, 64), *rest), rtol=1e-4, atol=1e-2
        )
    elif name == "bsr_conv2d_fprop":
        got = ops.bsr_conv2d_fprop(values.cuda(), *moved, None, x, channels, *rest)[ends].cpu()
        close(got, reference_blocks.bsr_conv2d_fprop(values.double(), *indices, None, near, channels, *rest))
    else:
        got = ops.bsr_conv2d_dgrad(values.cuda(), *moved, x, channels, image, *rest)[ends].cpu()
        close(got, reference_blocks.bsr_conv2d_dgrad(values.double(), *indices, near, channels, image, *rest))


def on_cuda(arguments: tuple) -> tuple:
    return tuple(a.detach().cuda().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    """Schemas, fakes and autograd registrations hold on CUDA tensors too."""
    torch.library.opcheck(operation(call), on_cuda(examples(torch.float32)[call]))


@pytest.mark.parametrize("name", BLOCK_SCHEMAS)
def test_opcheck_of_kernels(first_tile, name):
    """Those small calls have blocks that the reference computes."""
    arguments = calls(torch.float32, (32, 32))[name]
    next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()).requires_grad_()
    torch.library.opcheck(op(name), arguments)


@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_small_calls_equal_those_on_the_cpu(call):
    exact = examples(torch.float64)[call]
    given = on_cuda(tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in exact))
    given = tuple(
        a.detach().requires_grad_(b.requires_grad) if isinstance(a, Tensor) else a for a, b in zip(given, exact, strict=True)
    )
    for got, want in zip(_gradients(operation(call), given), _gradients(operation(call), exact), strict=True):
        close(got.cpu(), want, call)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", ["linear", "conv2d"])
def test_gradients_through_kernels_equal_those_of_the_reference(first_tile, family, dtype):
    """Of the product, and of its gradients once more: every member of the family, called by another."""
    if family == "linear":
        values, indices = block_matrix((96, 160), (32, 32), 0.4, torch.float32)
        x, name, rest = torch.randn(70, 160), "bsr_spmm", (96, True)
    else:
        values, indices = block_matrix((64, 48, 3, 3), (32, 16), 0.3, torch.float32)
        x, name, rest = torch.randn(3, 48, 9, 8), "bsr_conv2d_fprop", (64, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1])
    values, x = values.to(dtype).float() / 8, x.to(dtype)
    bias = torch.randn(96 if family == "linear" else 64)
    exact = tuple(t.double().requires_grad_() for t in (values, bias, x))
    given = tuple(t.cuda().requires_grad_() for t in (values, bias, x))

    def gradients(leaves, indices):
        y = op(name)(leaves[0], *indices, leaves[1], leaves[2], *rest)
        first = torch.autograd.grad(y.double().square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.double().square().sum() for t in first), leaves)
        return *first, *second

    for got, want in zip(gradients(given, [i.cuda() for i in indices]), gradients(exact, indices), strict=True):
        coarse = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        error = (got.cpu().double() - want).norm() / want.norm()
        assert error < coarse, f"{family}: {error}"


def _gradients(of, arguments: tuple) -> list[Tensor]:
    results = of(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    total = sum(result.double().square().sum() for result in results)
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
