"""Fused norms change how a model computes, not what; and every module can have its own class back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

from grasp_sparse.fusion import FusedBatchNorm2d, LayoutAdaptiveAvgPool2d, LayoutAvgPool2d, LayoutMaxPool2d, PassedReLU, fuse_, unfuse_
from grasp_sparse.nn import BatchNorm2d, SparseConv2d, SparseLinear
from grasp_sparse.pruning import make_masks
from grasp_sparse.surgery import densify_, load_sparse, sparsify_
from grasp_sparse.train.models import ResNet32, vgg_small


class Mixed(nn.Module):
    """Norms before and after pools, without a ReLU, behind a function, in a nested Sequential subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.ReLU())
        self.body = Conv2dNormActivation(8, 12, 3)
        self.tail = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False))
        self.norm = nn.BatchNorm2d(6, momentum=None)

    def forward(self, x):
        return self.norm(self.tail(self.body(self.stem(x)))).relu().mean((2, 3))


MODELS = {  # name -> (factory, number of norms, of which take a ReLU in, image size)
    "resnet18": (lambda: models.resnet18(num_classes=5), 20, 17, 40),
    "resnet50": (lambda: models.ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5), 20, 16, 40),
    "resnet32": (lambda: ResNet32(5, widths=(4, 8, 8), blocks=2), 15, 13, 12),
    "vgg_small": (lambda: vgg_small(5, 3, stem=4, widths=(8, 8)), 5, 5, 16),
    "vgg11_bn": (lambda: models.vgg11_bn(num_classes=5).features, 8, 8, 32),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=5), 11, 2, 36),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=5).features[:4], 9, 0, 20),
    "mixed": (Mixed, 4, 1, 20),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A float64 model in training with norms that are not the identity, its counts and an input."""
    factory, norms, with_relu, size = MODELS[request.param]
    model = factory().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, -0.5, 0.5)
    return model, norms, with_relu, torch.randn(4, 3, size, size, dtype=torch.float64)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, parameter gradients and buffers after one training step, and the output in evaluation."""
    x = x.detach().requires_grad_()
    y = model.train()(x)
    gradients = torch.autograd.grad(y.square().sum(), (x, *model.parameters()))
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        return [y, *gradients, *buffers, model.eval()(x)]


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def norms_with_relu(model: nn.Module) -> int:
    return sum(isinstance(module, FusedBatchNorm2d) and module.relu for module in model.modules())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_same_numbers(case, layout):
    model, norms, with_relu, x = case
    stock = copy.deepcopy(model)
    names = fuse_(model)
    assert len(names) == norms == sum(isinstance(m, FusedBatchNorm2d) for m in model.modules())
    assert all(type(model.get_submodule(name)) is FusedBatchNorm2d for name in names)
    assert norms_with_relu(model) == with_relu
    x = x.to(memory_format=layout)
    for got, want in zip(step(model, x), step(stock, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_float32_to_rounding(case):
    """The fused float32 model is as near to the float64 one as the stock float32 model is, up to a small factor."""
    model, _, _, x = case
    exact, stock = step(copy.deepcopy(model), x)[0], step(copy.deepcopy(model).float(), x.float())[0]
    fuse_(model.float())
    error, allowed = ((step(model, x.float())[0] - exact).abs().max(), (stock - exact).abs().max())
    assert error <= 4 * allowed + 1e-6


def test_nothing_but_classes_changes(case):
    model, _, _, x = case
    before, modules = classes(model), list(model.modules())
    state, objects = copy.deepcopy(model.state_dict()), [*model.parameters(), *model.buffers()]
    attributes = [dict(vars(module)) for module in modules]
    model.eval()
    fuse_(model)
    assert [*model.modules()] == modules and not model.training
    assert all(one is other for one, other in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert unfuse_(model.train()) is model
    assert classes(model) == before and [vars(module).keys() for module in modules] == [a.keys() for a in attributes]


def test_fused_models_copy_pickle_and_load(case):
    model, _, _, x = case
    fresh = copy.deepcopy(model)
    fuse_(model)
    clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    nn.init.zeros_(next(fresh.parameters()))
    fresh.load_state_dict(model.state_dict())  # stock and fused state_dicts are the same
    expected = step(model, x)
    for clone in (*clones, fresh):
        for got, want in zip(step(clone, x), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert norms_with_relu(clones[1]) == norms_with_relu(model)


def test_twice_is_once(case):
    model, _, _, x = case
    fuse_(model)
    fused = classes(model)
    assert fuse_(model) == [] and classes(model) == fused


def test_pooling_keeps_the_layout_and_goes_back():
    class Own(nn.MaxPool2d):
        pass

    model = nn.Sequential(nn.MaxPool2d(2), Own(2), nn.MaxPool2d(2, return_indices=True))
    before = classes(model)
    assert fuse_(model) == [] and classes(model)[1:] == [LayoutMaxPool2d, Own, LayoutMaxPool2d]
    x = torch.randn(2, 3, 17, 17)
    assert torch.equal(model(x)[0], nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2))(x))
    assert classes(unfuse_(model)) == before

    model = nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3))
    before, x = classes(model), x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    expected = model(x)
    assert fuse_(model) == [] and classes(model)[1:] == [LayoutAvgPool2d, LayoutAdaptiveAvgPool2d]
    torch.testing.assert_close(model(x), expected)
    assert model(x).permute(1, 2, 3, 0).is_contiguous() and not expected.permute(1, 2, 3, 0).is_contiguous()
    assert classes(unfuse_(model)) == before


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()


def _hook(index, register):
    def change(model):
        getattr(model[index], register)(lambda *_: None)
        return model

    return change


def _shared_relu(model):
    return nn.Sequential(model, nn.Conv2d(4, 4, 1).double(), model[2])


def _shared_norm(model):
    return nn.Sequential(model, nn.Conv2d(4, 4, 1).double(), model[1])


def _own_forward(model):
    model[1].forward = model[1].forward
    return model


class Tapped(nn.Sequential):
    def forward(self, x):
        before = self[1](self[0](x))
        return before + self[2](before)


def _tapped(model):
    return Tapped(*model)


def _leaky(model):
    model[2] = nn.LeakyReLU()
    return model


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def _own_norm(model):
    model[1] = OwnNorm(4).double()
    return model


LEFT = {
    "hook on the norm": _hook(1, "register_forward_hook"),
    "pre-hook on the ReLU": _hook(2, "register_forward_pre_hook"),
    "backward hook on the norm": _hook(1, "register_full_backward_hook"),
    "ReLU used twice": _shared_relu,
    "norm used twice": _shared_norm,
    "forward on the instance": _own_forward,
    "forward of its own": _tapped,
    "another activation": _leaky,
    "a subclass of BatchNorm2d": _own_norm,
}


@pytest.mark.parametrize("change", LEFT.values(), ids=LEFT)
def test_relu_stays_where_the_difference_could_be_seen(change):
    model = change(sequential())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    fuse_(model)
    assert norms_with_relu(model) == 0 and not any(isinstance(m, PassedReLU) for m in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def _copied(value):
    """What a hook was given last: the output, or the tuple of inputs; before a ReLU in place changes it."""
    return (value[0] if isinstance(value, tuple) else value).clone()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_inside_a_block_still_see_what_they_saw(register):
    block = BasicBlock(4, 4).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for name in ("bn1", "relu"):
        seen: list[list[torch.Tensor]] = []
        for fuse in (False, True):
            model = copy.deepcopy(block)
            here: list[torch.Tensor] = []
            getattr(model.get_submodule(name), register)(lambda module, *values, here=here: here.append(_copied(values[-1])))
            if fuse:
                fuse_(model)
            model(x)
            seen.append(here)
        assert len(seen[0]) == len(seen[1]) > 0
        for one, other in zip(*seen, strict=True):
            torch.testing.assert_close(one, other)


def test_a_norm_of_the_users_own_is_not_unfused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, relu=True))
    assert fuse_(model) == []
    unfuse_(model)
    assert type(model[1]) is BatchNorm2d and model[1].relu


def test_a_subclass_with_its_own_forward_does_not_inherit_the_promise():
    class Other(ResNet32):
        def forward(self, x):
            return self.bn1(self.conv1(x))

    model = Other(5, widths=(4, 4), blocks=1)
    fuse_(model)
    assert not model.bn1.relu and model.stages[0][0].bn1.relu


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model = models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    fuse_(model)
    twin, x = copy.deepcopy(model), torch.randn(3, 3, 40, 40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    torch._dynamo.reset()


def _mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), *layers, nn.Linear(30, 30), nn.ReLU(inplace=True), nn.Linear(30, 4)).double()


def _masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters() if p.dim() == 2}


def _linears_with_relu(model: nn.Module) -> int:
    return sum(isinstance(module, SparseLinear) and module.relu for module in model.modules())


def test_sparse_linear_takes_its_relu_in():
    model = _mlp(nn.Dropout(0.0))
    masks = _masks(model)
    stock = copy.deepcopy(model)
    for name, parameter in stock.named_parameters():
        if name in masks:
            parameter.data *= masks[name]
    x = torch.randn(7, 20, dtype=torch.float64)
    sparsify_(model, masks, max_density=1.0)
    assert _linears_with_relu(model) == 2 and sum(type(module) is PassedReLU for module in model.modules()) == 2
    assert "relu=True" in repr(model[0])
    got, want = step(model, x), step(stock, x)
    results = ["y", "x", *(name for name, _ in stock.named_parameters())]
    for name, actual, expected in zip(results, got[: len(results)], want[: len(results)], strict=True):
        torch.testing.assert_close(actual, expected[masks[name]].unsqueeze(0) if name in masks else expected)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(copied(x), want[0])

    loaded = load_sparse(_mlp(nn.Dropout(0.0)), model.state_dict())
    assert _linears_with_relu(loaded) == 2
    torch.testing.assert_close(loaded(x), want[0])

    unfused = unfuse_(copy.deepcopy(model))
    torch.testing.assert_close(unfused(x), want[0])
    assert _linears_with_relu(unfused) == 0 and not any(type(module) is PassedReLU for module in unfused.modules())

    densify_(model)
    assert classes(model) == classes(stock) and "relu" not in vars(model[0])
    torch.testing.assert_close(model(x), want[0])


@pytest.mark.parametrize("why", ["hook on the layer", "hook on the ReLU", "the ReLU twice", "the layer twice", "masked layer"])
def test_relu_stays_where_something_would_see_the_difference(why):
    mlp = _mlp()
    model = nn.ModuleList([mlp])
    if why == "hook on the layer":
        mlp[0].register_forward_hook(lambda *_: None)
    elif why == "hook on the ReLU":
        mlp[1].register_forward_pre_hook(lambda *_: None)
    elif why == "the ReLU twice":
        model.append(mlp[1])
    elif why == "the layer twice":
        model.append(mlp[0])
    masks = _masks(model)
    runs = {name: "masked" if why == "masked layer" and name == "0.0.weight" else "sparse" for name in masks}
    sparsify_(model, masks, plan=runs)
    assert not getattr(mlp[0], "relu", False) and type(mlp[1]) is nn.ReLU
    assert mlp[2].relu and type(mlp[3]) is PassedReLU


def test_sparse_convolution_of_blocks_takes_its_relu_in():
    """One of single weights does not: its kernels have no ReLU."""
    def model() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 4)
        ).double()  # fmt: skip

    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    for pattern, fused in (("block(2, 2)", 2), ("unstructured", 0)):
        sparse, stock = model(), model()
        masks = make_masks({name: p.detach().abs() for name, p in stock.named_parameters() if p.dim() == 4}, 0.5, pattern)
        with torch.no_grad():
            for name, mask in masks.items():
                stock.get_parameter(name).mul_(mask)
        sparsify_(sparse, masks, max_density=1.0)
        convs = [module for module in sparse if isinstance(module, SparseConv2d)]
        assert [conv.relu for conv in convs] == [fused > 0] * 2
        assert sum(type(module) is PassedReLU for module in sparse) == fused and ("relu=True" in repr(convs[0])) == (fused > 0)
        got, want = step(sparse, x), step(stock, x)
        torch.testing.assert_close((got[0], got[1], got[-1]), (want[0], want[1], want[-1]))
        loaded = load_sparse(model(), sparse.state_dict())
        torch.testing.assert_close(loaded(x), want[0])
        assert [type(module) for module in loaded] == [type(module) for module in sparse]
        unfused = unfuse_(copy.deepcopy(sparse))
        torch.testing.assert_close(unfused(x), want[0])
        assert not any(type(module) is PassedReLU or getattr(module, "relu", False) for module in unfused)
        densify_(sparse)
        assert classes(sparse) == classes(stock) and "relu" not in vars(sparse[0])
        torch.testing.assert_close(sparse(x), want[0])


def test_relu_of_single_weights_is_refused():
    conv = SparseConv2d.from_dense(nn.Conv2d(3, 4, 3), torch.ones(4, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="Expected relu with values of whole blocks only"):
        SparseConv2d(3, 4, (3, 3), conv.values, conv.indices, relu=True)
