"""The fused batch norm layer is nn.BatchNorm2d, an add and a ReLU: same numbers, same state, in every mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from grasp_sparse import _extension
from grasp_sparse.nn import BatchNorm2d
from grasp_sparse.ops.layout import is_batch_innermost

KINDS = {
    "default": {},
    "cumulative average": dict(momentum=None),
    "not affine": dict(affine=False),
    "no running statistics": dict(track_running_stats=False),
    "momentum 0.7": dict(momentum=0.7, eps=1e-2),
}


def pair(kind: str = "default", dtype=torch.float64) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's with the same random state."""
    ours = BatchNorm2d(5, **KINDS[kind], dtype=dtype)
    for tensor in (*ours.parameters(), *ours.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    stock = nn.BatchNorm2d(5, **KINDS[kind], dtype=dtype)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def images(dtype=torch.float64, batch: int = 4) -> torch.Tensor:
    return (torch.randn(batch, 5, 6, 7, dtype=torch.float64) * 3 + 2).to(dtype).requires_grad_()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_torch(dtype, tolerance, kind, training, relu, with_residual):
    ours, stock = pair(kind, dtype)
    ours.train(training), stock.train(training)
    for batch in (4, 2, 9):  # the running statistics follow over several steps
        x, residual = images(dtype, batch), images(dtype, batch) if with_residual else None
        expected = stock(x)
        expected = expected + residual if with_residual else expected
        expected = expected.relu() if relu else expected
        y = ours(x, residual, relu)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        inputs = [x, *([residual] if with_residual else []), *ours.parameters()]
        stock_inputs = [x, *([residual] if with_residual else []), *stock.parameters()]
        g = torch.randn_like(y)
        for got, want in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, stock_inputs, g), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance * 10, atol=tolerance * 10)
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not _extension.status().loaded, reason="compiled kernels are not loaded")
def test_training_runs_the_fused_operation():
    ours, _ = pair(dtype=torch.float32)
    with torch.profiler.profile() as profile:
        ours(images(torch.float32), images(torch.float32), relu=True).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"grasp_sparse::batch_norm_train", "grasp_sparse::batch_norm_backward"} <= names
    assert not names & {"aten::native_batch_norm", "aten::relu", "aten::threshold_backward"}


def test_other_dtypes_run_torchs_own():
    ours, stock = pair(dtype=torch.float32)
    x, residual = images(torch.float16), images(torch.float16)
    torch.testing.assert_close(ours(x, residual, relu=True), (stock(x) + residual).relu())


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_images_are_rounded_once(training):
    ours, stock = pair(dtype=torch.float32)
    ours.train(training), stock.train(training)
    x, residual = images(torch.bfloat16).detach(), images(torch.bfloat16).detach()
    with torch.no_grad():
        y, expected = ours(x, residual, relu=True), (stock(x.float()) + residual.float()).relu()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16(), rtol=4e-3, atol=1e-6)
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not _extension.status().loaded, reason="compiled kernels are not loaded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_batch_stays_innermost(training, dtype):
    ours = BatchNorm2d(5).train(training)
    x = images(dtype).detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    with torch.no_grad():
        assert is_batch_innermost(ours(x, x, relu=True))
        assert is_batch_innermost(ours(x))


def test_a_residual_that_broadcasts():
    ours, stock = pair()
    x, residual = images(), torch.randn(5, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(ours(x, residual, relu=True), (stock(x) + residual).relu())


def test_refuses_what_torch_refuses():
    ours, stock = pair()
    for x in (torch.randn(4, 5, dtype=torch.float64), torch.randn(1, 5, 1, 1, dtype=torch.float64)):
        with pytest.raises(ValueError) as expected:
            stock(x)
        with pytest.raises(ValueError) as got:
            ours(x)
        assert str(got.value) == str(expected.value)
    assert BatchNorm2d(5).eval()(torch.randn(0, 5, 2, 2)).shape == (0, 5, 2, 2)


def test_second_derivatives():
    ours, stock = pair()
    x, residual = images(), images()
    results = []
    for y in (ours(x, residual, relu=True), (stock(x) + residual).relu()):
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gx.square().sum(), (x, residual)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_copies_pickles_and_state_dicts():
    ours, stock = pair()
    x = images()
    expected = copy.deepcopy(ours)(x)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(x), expected)
    assert list(ours.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_to_one_graph(layout):
    torch._dynamo.reset()
    ours, _ = pair(dtype=torch.float32)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, residual = images(torch.float32), images(torch.float32)
    g = torch.randn(4, 5, 6, 7)
    results = []
    for module, plain in ((compiled, ours), (twin, twin)):
        y = module(x.to(memory_format=layout), residual, relu=True)
        results.append((y, *torch.autograd.grad(y, (x, residual, *plain.parameters()), g)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(ours.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_a_gradient_by_given_statistics_is_theirs_though_training_went_on():
    """torch's own takes those of the backward's time."""
    norm, x, other = BatchNorm2d(5, dtype=torch.float64), images(), images()
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    (expected,) = torch.autograd.grad(norm.eval()(x).square().sum(), x)
    y = norm(x).square().sum()
    norm.train()(other)
    (found,) = torch.autograd.grad(y, x)
    assert torch.equal(found, expected)
