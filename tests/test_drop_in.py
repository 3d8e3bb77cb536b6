"""Sparse models go where dense ones do: torchvision's networks, autocast, compile, copies, other dtypes, transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import grasp_sparse as gs
from grasp_sparse.nn import MaskedLinear, SparseConv2d, SparseLayer, SparseLinear
from pruned_models import pruned_copy

DENSITY = 0.05


def _random_masks(model: nn.Module, density: float = DENSITY) -> gs.MaskSet:
    return gs.prune(model, sparsity=1 - density, criterion="random", scope="layer", seed=0)


NETWORKS = {
    "resnet18": (torchvision.models.resnet18, 64, 21),
    "resnet50": (torchvision.models.resnet50, 64, 54),
    "vgg16_bn": (torchvision.models.vgg16_bn, 32, 16),
    "vgg19_bn": (torchvision.models.vgg19_bn, 32, 19),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64, 36),
    "vit_b_16-of-2-blocks": (lambda **k: torchvision.models.VisionTransformer(32, 16, 2, 12, 768, 3072, **k), 32, 6),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request):
    build, size, layers = request.param
    if build in (torchvision.models.vgg16_bn, torchvision.models.vgg19_bn):
        model = build(num_classes=10)
        model.avgpool, model.classifier = nn.Identity(), nn.Linear(512, 10)  # as for small images; the full one has 120M weights
        layers -= 2
    else:
        model = build(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double(), torch.randn(2, 3, size, size, dtype=torch.float64), layers


def test_torchvision_network(network):
    """Same outputs and gradients as the pruned dense network, state_dict round trip, and back to it exactly."""
    model, x, layers = network
    masks = _random_masks(model)
    assert len(masks) == layers
    dense = pruned_copy(model, masks)
    report = gs.sparsify_(model, masks, x, plan="density")
    assert sum(row.runs == "sparse" for row in report.rows) == layers
    assert {row.name for row in report.rows if row.runs == "dense"} == {name for name, _ in masks.skipped}
    assert all(row.reason for row in report.rows if row.runs == "dense")
    for each in (model, dense):
        each(x).square().sum().backward()
    torch.testing.assert_close(model(x), dense(x))
    gradients = dict(dense.named_parameters())
    for name, mask in masks.items():
        layer, expected = model.get_submodule(name.removesuffix(".weight")), gradients[name].grad[mask]
        torch.testing.assert_close(layer.values.grad[0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    gs.densify_(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_what_stays_dense_in_a_vision_transformer_is_said():
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=10)
    masks = _random_masks(model)
    report = gs.sparsify_(model, masks)
    dense = [row for row in report.rows if row.runs == "dense"]
    assert {row.kind for row in dense} >= {"MultiheadAttention", "NonDynamicallyQuantizableLinear"}
    assert all(row.reason for row in dense)
    assert {row.kind for row in report.rows if row.runs == "sparse"} == {"Conv2d", "Linear"}
    assert isinstance(model.encoder.layers[0].mlp[0], SparseLinear) and isinstance(model.conv_proj, SparseConv2d)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torch_transformer_layers_read_weights_themselves():
    """In evaluation they hand their weights to a fused kernel, so these layers keep one: dense, exactly masked."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    masks = _random_masks(model, 0.3)
    dense, x = pruned_copy(model, masks), torch.randn(2, 5, 16)
    report = gs.sparsify_(model, masks)
    assert isinstance(model.layers[0].linear1, MaskedLinear)
    assert {row.reason for row in report.rows if row.runs == "masked"} == {"TransformerEncoderLayer reads the weight"}
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), dense.train(mode)(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def small():
    """A residual network small enough to compile, and its pruned dense twin."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    masks = _random_masks(model)
    dense = pruned_copy(model, masks)
    gs.sparsify_(model, masks)
    return model, dense, torch.randn(4, 3, 32, 32)


def test_deepcopy_and_pickle_are_independent_and_equal(small):
    model, _, x = small
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), copy.deepcopy(model).eval()(x))
        other.fc.values.data.zero_()
        assert model.fc.values.any()
    state = pickle.loads(pickle.dumps(model.state_dict()))
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(small, dtype):
    model, dense, x = (part.to(dtype) for part in small)
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x), dense(x), **({"rtol": 0.1, "atol": 0.3} if dtype == torch.bfloat16 else {}))
    assert all(buffer.dtype == torch.int32 for name, buffer in model.named_buffers() if "indices" in name or "permutation" in name)
    model(x).sum().backward()
    assert model.fc.values.grad.dtype == dtype


def test_meta_device(small):
    """Shapes without data, as for counting operations; a masked layer cannot count its weights there but prints."""
    model, _, x = small
    model.avgpool = MaskedLinear(1, 1)
    model.to("meta")
    assert "density" in repr(model.fc) and "MaskedLinear" in repr(model.avgpool)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    assert model(x.to("meta")).shape == (4, 10)


def test_bfloat16_autocast(small):
    model, dense, x = small
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x), dense(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_memory_format(small, layout):
    model, dense, x = small
    torch.testing.assert_close(model.to(memory_format=layout)(x.to(memory_format=layout)), dense(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compile_is_one_graph(small, fresh_dynamo):
    model, dense, x = small
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (compiled, dense):
        each(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), dense(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.fc.bias.grad, dense.fc.bias.grad, rtol=1e-3, atol=1e-2)
    assert all(module.values.grad is not None for module in model.modules() if isinstance(module, SparseLayer))


def test_compile_with_inductor(fresh_dynamo):
    """Sparse convolution, masked convolution and sparse linear in one graph; channels_last in, as compilers like to choose."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 5))
    masks = {name: torch.rand_like(p) < 0.2 for name, p in model.named_parameters() if p.dim() > 1}
    dense = pruned_copy(model, masks)
    gs.sparsify_(model, masks)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    for each in (compiled, dense):
        each(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), dense(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].values.grad[0], dense[0].weight.grad[masks["0.weight"]], rtol=1e-3, atol=1e-3)


def test_export(small):
    model, dense, x = small
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), dense.eval()(x), rtol=1e-4, atol=1e-4)


def test_functional_call(small):
    model, _, x = small
    model.eval()
    doubled = {"fc.values": model.fc.values * 2, "fc.bias": model.fc.bias * 2}
    torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), model(x) * 2)


def test_checkpointed_activations(small):
    model, _, x = small
    model.eval()
    direct = torch.autograd.grad(model(x).sum(), model.conv1.values)[0]
    recomputed = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), model.conv1.values)[0], direct)


def test_hessian_vector_product_through_sparse_layers():
    """Double backward, as GraSP needs it, equals the pruned dense network's at the kept weights."""
    convolutions = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Tanh()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(36, 3)).double()
    masks = _random_masks(model, 0.2)
    dense, x = pruned_copy(model, masks), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    gs.sparsify_(model, masks)

    def product(each):
        weights = list(each.parameters())
        gradient = torch.autograd.grad(each(x).logsumexp(1).sum(), weights, create_graph=True)
        if each is dense:
            named = dict(zip((name for name, _ in dense.named_parameters()), gradient, strict=True))
            gradient = [g * masks[name] if name in masks else g for name, g in named.items()]
        return torch.autograd.grad(sum(g.square().sum() for g in gradient), weights)

    for (name, _), actual, expected in zip(dense.named_parameters(), product(model), product(dense), strict=True):
        torch.testing.assert_close(actual.flatten(), expected[masks[name]] if name in masks else expected)


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_a_layer_whose_weight_others_read_is_left_its_weight_and_stays_pruned(density):
    """torchvision's Swin, whose attention multiplies by the weights of layers that it never calls."""

    def small():
        torch.manual_seed(0)
        return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [2, 2], num_classes=5, stochastic_depth_prob=0.0)

    model, x = small(), torch.randn(2, 3, 32, 32)
    masks = _random_masks(model, density)
    dense = pruned_copy(model, masks)
    report = gs.sparsify_(model, masks, x)
    assert {row.reason for row in report.rows if row.name.endswith(("qkv", "proj"))} == {"not called on the example"}
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, parameter in gs.densify_(model).named_parameters():
        assert name not in masks or not parameter[~masks[name]].any(), name
