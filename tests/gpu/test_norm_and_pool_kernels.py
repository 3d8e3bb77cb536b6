"""Batch norm and max pooling on a device: the laws that the emulator checks on small shapes, at sizes that fill a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from csr_laws import STORED
from op_cases import IMAGE_LAYOUTS, NORM_CASES, close, is_chwn, norm_inputs
from pool_cases import WINDOWS
from torch import nn

from grasp_sparse.nn import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, MaxPool2d
from grasp_sparse.ops import reference, reference_pool
from grasp_sparse.ops.dtypes import compute_dtype

pytestmark = pytest.mark.gpu

ops = torch.ops.grasp_sparse
EPS = 1e-5
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CHWN = IMAGE_LAYOUTS["CHWN"][0]
SHAPES = [(64, 64, 56, 56), (256, 512, 7, 7), (33, 67, 14, 13), (128, 3, 32, 32), (5, 2000, 2, 3)]
dtypes = pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)


@pytest.fixture(autouse=True)
def compiled():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grasp_sparse::batch_norm_train", "CUDA"):
        pytest.fail("the CUDA kernels are not built: FORCE_CUDA=1 pip install --no-build-isolation .")


def norm_arguments(shape, case, dtype, lies=CHWN):
    residual, _, affine = case
    tensors = norm_inputs(shape, residual, affine)
    to = [t if t is None else t.to(dtype if t.dim() == 4 else compute_dtype(dtype)).cuda() for t in tensors]
    return [lies(t) if t is not None and t.dim() == 4 else t for t in to]


def exact(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def check_norm(shape, case, dtype, lies=CHWN) -> None:
    relu = case[1]
    given = norm_arguments(shape, case, dtype, lies)
    y, mean, var = ops.batch_norm_train(*given, EPS, relu)
    for got, want in zip((y, mean, var), reference.batch_norm_train(*exact(given), EPS, relu), strict=True):
        close(got, want, f"train {case}")
    assert torch.equal(ops.batch_norm_eval(*given, mean, var, EPS, relu), y)
    x, r, w, b = given
    saved = (lies(torch.randn_like(x)), x, y if r is not None and relu else None, w, b, mean, var)
    results = ops.batch_norm_backward(*saved, EPS, relu), reference.batch_norm_backward(*exact(saved), EPS, relu)
    images, vectors = (list(zip(*(result[part] for result in results), strict=True)) for part in (slice(2), slice(2, 4)))
    for got, want in images:  # a value next to zero may lie on either side of the ReLU
        wrong = (got.double() - want).abs() > GRADIENT_TOLERANCE[dtype] * (1 + want.abs())
        assert wrong.sum() <= (got.numel() // 10_000 if relu else 0), case
    for got, want in vectors:  # sums of many numbers that cancel, in what is computed in
        assert (got.double() - want).abs().max() <= GRADIENT_TOLERANCE[got.dtype] * (1 + want.abs().max()), case


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_batch_norm(dtype, shape):
    for case in NORM_CASES:
        check_norm(shape, case, dtype)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_batch_norm_in_every_layout(layout):
    for dtype in (torch.float32, torch.bfloat16):
        check_norm((16, 40, 14, 14), (True, True, True), dtype, IMAGE_LAYOUTS[layout][0])


def test_digits_survive_a_large_mean():
    x = norm_inputs((64, 6, 40, 40), False, False, mean=-1e6)[0].float().cuda()
    _, mean, var = ops.batch_norm_train(CHWN(x), None, None, None, EPS, False)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", ["CHWN", "NCHW", "channels_last"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@dtypes
def test_max_pool(dtype, window, layout):
    x = IMAGE_LAYOUTS[layout][0](torch.randn(32, 70, 29, 31).relu().to(dtype)).cuda()
    y, places = ops.max_pool2d(x, *window)
    wanted, wanted_places = reference_pool.max_pool2d(x, *window)
    assert torch.equal(y, wanted) and torch.equal(places, wanted_places) and y.stride() == wanted.stride()
    g = torch.randn_like(y)
    gx = ops.max_pool2d_backward(g, places, x.shape[2:], *window)
    close(gx, reference_pool.max_pool2d_backward(g.double(), places, x.shape[2:], *window))
    assert gx.stride() == x.stride() or not x.is_contiguous()


@dtypes
def test_the_same_bits_on_every_run(dtype):
    x, r, w, b = norm_arguments((64, 64, 56, 56), (True, True, True), dtype)
    window, runs = WINDOWS["3x3/2"], []
    for _ in range(3):
        y, mean, var = ops.batch_norm_train(x, r, w, b, EPS, True)
        pooled, places = ops.max_pool2d(y, *window)
        gx = ops.max_pool2d_backward(pooled, places, y.shape[2:], *window)
        runs.append((y, mean, var, pooled, gx, *ops.batch_norm_backward(gx, x, y, w, b, mean, var, EPS, True)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_opcheck():
    x, r, w, b = (t.requires_grad_() for t in norm_arguments((8, 6, 5, 7), (True, True, True), torch.float32))
    mean, var = torch.randn(6, device="cuda"), torch.rand(6, device="cuda") + 1
    torch.library.opcheck(ops.batch_norm_train.default, (x, r, w, b, EPS, True))
    torch.library.opcheck(ops.batch_norm_eval.default, (x, r, w, b, mean, var, EPS, True))
    torch.library.opcheck(ops.batch_norm_follow_.default, (mean.clone(), var.clone(), mean, var, 0.1, 280))
    torch.library.opcheck(ops.max_pool2d.default, (x, *WINDOWS["3x3/2"]))


def chain(own: bool) -> nn.Sequential:
    kinds = (BatchNorm2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d) if own else (nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    norm, most, average, end = kinds
    return nn.Sequential(norm(24), nn.ReLU(), most(3, 2, 1), norm(24), average(2), nn.ReLU(), end(3)).cuda()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_chain_equals_torchs_and_stays_batch_innermost(training):
    ours, stock = chain(True).train(training), chain(False).train(training)
    x = CHWN(torch.randn(16, 24, 40, 40).cuda()).requires_grad_()
    reference_x = x.detach().double().contiguous().requires_grad_()
    stock = stock.double()
    y, expected = ours(x), stock(reference_x)
    g = torch.randn_like(y)
    y.backward(g), expected.backward(g.double())
    assert is_chwn(y) and is_chwn(x.grad)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), reference_x.grad, rtol=1e-2, atol=1e-3)
    for got, want in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


def test_a_recorded_step_is_replayed():
    norm, pool = BatchNorm2d(24).cuda(), MaxPool2d(2)
    x = CHWN(torch.randn(16, 24, 20, 20).cuda())

    def step() -> torch.Tensor:
        y = pool(norm(x, relu=True))
        y.sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    norm.zero_grad(set_to_none=True)
    twin = copy.deepcopy(norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = pool(twin(x, relu=True))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(norm.running_var, twin.running_var)


@pytest.mark.large
def test_more_than_32_bits_of_elements():
    channels, side, batch = 70, 174, 1024
    if torch.cuda.get_device_properties(0).total_memory < 8 * channels * side**2 * batch:
        pytest.skip("needs 18 GB of memory")
    x = torch.empty(channels, side, side, batch, device="cuda", dtype=torch.bfloat16).normal_().permute(3, 0, 1, 2)
    window = WINDOWS["2x2/2"]
    y, _ = ops.max_pool2d(x, *window)
    assert torch.equal(y[:, -1:], reference_pool.max_pool2d(x[:, -1:], *window)[0])
    del y
    y, mean, var = ops.batch_norm_train(x, None, None, None, EPS, True)
    wanted, wanted_mean, wanted_var = reference.batch_norm_train(x[:, -1:].double(), None, None, None, EPS, True)
    close(y[:, -1:], wanted), close(mean[-1:], wanted_mean), close(var[-1:], wanted_var)
