"""A sparse convolution and its norm as one operation: when they are, and that it is the same network all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torchvision.models.resnet import Bottleneck, ResNet

from fused_calls import step
from grasp_sparse.fusion import fuse_, unfuse_
from grasp_sparse.nn import BatchNorm2d, FusedSequential, SparseConv2d, conv_norm, conv_norm_relu, sequential
from grasp_sparse.surgery import sparsify_
from grasp_sparse.train.models import ResNet32

together = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("grasp_sparse::csr_spmm", "CPU"), reason="compiled kernels are not loaded"
)


def layers(dtype=torch.float64, **norm_options) -> tuple[SparseConv2d, BatchNorm2d]:
    conv = nn.Conv2d(5, 16, 3, padding=1, bias=True)
    norm = BatchNorm2d(16, **norm_options)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.5, 0.5)
    return SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.3).to(dtype), norm.to(dtype)


def images(dtype=torch.float64, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 5, 6, 7, dtype=dtype).to(memory_format=torch.channels_last)


def operations(function) -> set[str]:
    with torch.profiler.profile() as profiler:
        function()
    return {event.name for event in profiler.events() if event.name.startswith("grasp_sparse::")}


def _step(conv, norm, x, residual=None, relu=None):
    """Everything a training step gives, by one call of both or by one of each."""
    x = x.detach().requires_grad_()
    y = conv_norm_relu(conv, norm, x, residual, relu)
    wanted = [t for t in (x, *conv.parameters(), *norm.parameters(), residual) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), wanted), *norm.buffers()]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [None, nn.ReLU(), nn.GELU()], ids=["function", "ReLU", "GELU"])
def test_the_same_as_one_after_the_other(relu, with_residual, options):
    conv, norm = layers(**options)
    other = copy.deepcopy(conv), copy.deepcopy(norm)
    other[0].register_forward_hook(lambda *_: None)  # who looks in between gets both
    residual = torch.randn(4, 16, 6, 7, dtype=torch.float64).requires_grad_() if with_residual else None
    for x in (images(), images()):
        for got, want in zip(_step(conv, norm, x, residual, relu), _step(*other, x, residual, relu), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@together
def test_it_is_one_operation_in_training():
    conv, norm = layers(torch.float32)
    ran = operations(lambda: _step(conv, norm, images(torch.float32)))
    assert ran == {"grasp_sparse::csr_conv2d_norm_train", "grasp_sparse::csr_conv2d_norm_backward", "grasp_sparse::batch_norm_follow_"}


def _evaluation(conv, norm):
    norm.eval()


def _hooked(conv, norm):
    norm.register_forward_pre_hook(lambda *_: None)


def _own_forward(conv, norm):
    conv.forward = conv.forward


def _own_call(conv, norm):
    conv.__class__ = type("Own", (SparseConv2d,), {"__call__": lambda self, x: super(SparseConv2d, self).__call__(x)})


@together
@pytest.mark.parametrize("change", [_evaluation, _hooked, _own_forward, _own_call])
def test_it_is_two_where_that_is_better_or_somebody_looks(change):
    conv, norm = layers(torch.float32)
    change(conv, norm)
    assert not any("conv2d_norm" in name for name in operations(lambda: conv_norm_relu(conv, norm, images(torch.float32))))


@together
@pytest.mark.parametrize("x", [
    images(torch.float32).contiguous(), images(torch.float32).permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
], ids=["NCHW", "CHWN"])  # fmt: skip
def test_it_is_two_in_layouts_that_gain_nothing(x):
    conv, norm = layers(torch.float32)
    assert not any("conv2d_norm" in name for name in operations(lambda: conv_norm_relu(conv, norm, x)))


@together
def test_under_autocast_images_are_bfloat16():
    conv, norm = layers(torch.float32)
    other, x = (copy.deepcopy(conv), copy.deepcopy(norm)), images(torch.float32)
    other[0].register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        assert "grasp_sparse::csr_conv2d_norm_train" in operations(lambda: conv_norm_relu(conv, norm, x))
        norm.reset_running_stats()
        got, want = conv_norm_relu(conv, norm, x), conv_norm_relu(*other, x)
    assert got.dtype == want.dtype == torch.bfloat16 and torch.equal(got, want)
    assert all(torch.equal(one, two) for one, two in zip(norm.buffers(), other[1].buffers(), strict=True))
    with torch.autocast("cpu", torch.float16):
        assert conv_norm_relu(conv, norm, x).dtype == torch.float16


def test_a_residual_that_broadcasts():
    conv, norm = layers()
    x, residual = images(), torch.randn(16, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(conv_norm_relu(conv, norm, x, residual), (norm(conv(x)) + residual).relu())


def test_refusals_change_nothing():
    conv, norm = layers()
    for x, message in (
        (images()[:, :3].contiguous(memory_format=torch.channels_last), "Expected x of shape"),
        (images().float(), "one dtype"),
        (images()[0], "4D"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_norm_relu(conv, norm, x)
    norm.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="weight of 16|weight to have 16"):
        conv_norm_relu(conv, norm, images())
    conv.col_indices.fill_(0)
    with pytest.raises(RuntimeError, match="index buffers of a sparse layer"):
        conv_norm_relu(conv, norm, images())
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


def test_one_value_per_channel_is_refused_in_torchs_words():
    conv, norm = layers()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_norm_relu(conv, norm, images(batch=1)[:, :, :1, :1])


@together
def test_float64_is_left_alone_by_autocast():
    conv, norm = layers(affine=False, track_running_stats=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_norm_relu(conv, norm, images(), torch.zeros(4, 16, 6, 7, dtype=torch.bfloat16))
    assert y.dtype == torch.float64


@together
@pytest.mark.parametrize("kind", [SparseConv2d, BatchNorm2d])
def test_a_call_of_ones_own_gets_nothing_but_x(kind):
    conv, norm = layers()
    own = type("Own", (kind,), {"__call__": lambda self, x: super(type(self), self).__call__(x)})
    x = images()
    expected = conv_norm_relu(conv, norm, x)
    (conv if kind is SparseConv2d else norm).__class__ = own
    torch.testing.assert_close(conv_norm_relu(conv, norm, x), expected)
    torch.testing.assert_close(FusedSequential(conv, norm, nn.ReLU())(x), expected)


@pytest.mark.parametrize("frozen", [("values",), ("values", "bias"), ("values", "bias", "x"), ("bias",), ("x",)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_bits_stay(frozen):
    conv, norm = layers(torch.float32)
    x = images(torch.float32).requires_grad_()
    given = {"values": conv.values, "bias": conv.bias, "x": x, "weight": norm.weight}
    expected = conv_norm_relu(conv, norm, x)
    gradients = dict(zip(given, torch.autograd.grad(expected.square().sum(), list(given.values())), strict=True))
    for name in frozen:
        given.pop(name).requires_grad_(False)
    y = conv_norm_relu(conv, norm, x)
    got = torch.autograd.grad(y.square().sum(), list(given.values()))
    with torch.no_grad():
        assert torch.equal(y, expected) and torch.equal(conv_norm_relu(conv, norm, x), expected)
    scale = gradients["values"].abs().max()
    for name, gradient in zip(given, got, strict=True):
        torch.testing.assert_close(gradient / scale, gradients[name] / scale, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    conv, norm = layers()
    results = []
    for hooked in (False, True):
        if hooked:
            conv.register_forward_hook(lambda *_: None)
        torch.manual_seed(0)
        x = images().requires_grad_()
        y = conv_norm_relu(conv, norm, x)
        first = torch.autograd.grad(y.square().sum(), (x, conv.values), create_graph=True)
        results.append(torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, conv.values, norm.weight)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def _sparse(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    masks = {name: torch.rand_like(p) < 0.4 for name, p in model.named_parameters() if p.dim() == 4}
    sparsify_(model, masks, plan=dict.fromkeys(masks, "sparse"))
    return model


MODELS = {  # a network, the size of its images, its convolutions with a norm
    "bottlenecks": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5), 40, 17),
    "ResNet32": (lambda: ResNet32(5, widths=(16, 16, 24), blocks=1), 12, 9),
    "sequence": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 20, 1), nn.BatchNorm2d(20)), 12, 2),
}


@together
@pytest.mark.parametrize("name", MODELS)
def test_networks_compute_what_they_did(name, monkeypatch):
    factory, size, count = MODELS[name]
    x = torch.randn(4, 3, size, size, dtype=torch.float64).to(memory_format=torch.channels_last)
    model = _sparse(factory().double().to(memory_format=torch.channels_last))
    apart = copy.deepcopy(model)
    got = step(model, x)
    with torch.profiler.profile() as profiler:
        model.train()(x)
    assert sum(event.name == "grasp_sparse::csr_conv2d_norm_train" for event in profiler.events()) == count
    for module in (conv_norm, sequential):
        monkeypatch.setattr(module, "runs_as_one", lambda *_: False)
    for one, other in zip(got, step(apart, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@together
def test_a_sequence_of_these_two_alone_is_fused_and_goes_back():
    model = _sparse(nn.Sequential(nn.Conv2d(5, 16, 1), nn.BatchNorm2d(16)))
    assert isinstance(model, FusedSequential)
    assert "grasp_sparse::csr_conv2d_norm_train" in operations(lambda: model.train()(images(torch.float32)))
    assert type(unfuse_(model)) is nn.Sequential
    fuse_(model)
    assert isinstance(model, FusedSequential)


@together
def test_compiles_to_one_graph():
    conv, norm = layers(torch.float32)
    model = nn.Sequential(conv, norm, nn.ReLU())
    model.__class__ = FusedSequential
    other, x = copy.deepcopy(model), images(torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for got, want in zip(step(compiled, x), step(other, x), strict=True):
        torch.testing.assert_close(got, want)
    assert any("csr_conv2d_norm_train" in str(node.target) for node in graphs[0].graph.nodes)
