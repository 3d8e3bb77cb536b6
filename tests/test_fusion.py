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

from fused_calls import classes, fused_calls, step
from grasp_sparse.fusion import FusedBatchNorm2d, LayoutAdaptiveAvgPool2d, LayoutAvgPool2d, LayoutMaxPool2d, fuse_, unfuse_
from grasp_sparse.nn import BatchNorm2d, FusedSequential
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


MODELS = {  # name -> (factory, number of norms, of which apply the ReLU behind them, image size)
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_same_numbers(case, layout):
    model, norms, with_relu, x = case
    stock = copy.deepcopy(model)
    names = fuse_(model)
    assert len(names) == norms == sum(isinstance(m, FusedBatchNorm2d) for m in model.modules())
    assert all(type(model.get_submodule(name)) is FusedBatchNorm2d for name in names)
    assert len(fused_calls(copy.deepcopy(model), x)) == with_relu
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
    assert [vars(module) for module in modules] == [{**a, "training": False} for a in attributes]
    assert all(one is other for one, other in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert unfuse_(model.train()) is model
    assert classes(model) == before and [vars(module).keys() for module in modules] == [a.keys() for a in attributes]


def test_fused_models_copy_pickle_and_load(case):
    model, _, with_relu, x = case
    fresh = copy.deepcopy(model)
    fuse_(model)
    clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    nn.init.zeros_(next(fresh.parameters()))
    fresh.load_state_dict(model.state_dict())  # stock and fused state_dicts are the same
    expected = step(model, x)
    for clone in (*clones, fresh):
        for got, want in zip(step(clone, x), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for clone in clones:
        assert len(fused_calls(clone, x)) == with_relu and classes(clone) == classes(model)


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
    assert fused_calls(copy.deepcopy(model), x) == []
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_layers_used_twice():
    model = sequential()
    model = nn.Sequential(model, nn.Conv2d(4, 4, 1).double(), model[2], model[1])
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = step(copy.deepcopy(model), x)
    fuse_(model)
    assert len(fused_calls(copy.deepcopy(model), x)) == 1  # the norm's, in the one place where a ReLU is behind it
    for got, want in zip(step(model, x), expected, strict=True):
        torch.testing.assert_close(got, want)


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
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4))
    assert fuse_(model) == []
    unfuse_(model)
    assert type(model[1]) is BatchNorm2d


def test_a_subclass_with_its_own_forward_is_called_as_it_says():
    class Other(ResNet32):
        def forward(self, x):
            return self.stages[0][0](self.bn1(self.conv1(x)))

    model, x = Other(5, widths=(4, 4), blocks=1), torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)(x)
    fuse_(model)
    block = model.stages[0][0]
    assert fused_calls(model, x) == [block.bn1, block.bn2]
    torch.testing.assert_close(model(x), expected)


class Copied(nn.Sequential):
    def __reduce__(self):
        return Copied, tuple(self)


class Registered(nn.Sequential):
    names: list[str] = []

    def __init_subclass__(cls):
        Registered.names.append(cls.__name__)


@pytest.mark.parametrize("kind", [Copied, Registered])
def test_a_sequence_with_ways_of_its_own_is_left_alone(kind):
    model = kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert fuse_(model) == ["1"] and type(model) is kind and Registered.names == []


def test_a_sequence_without_a_pair_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), None, nn.ReLU())
    assert fuse_(model) == ["2"] and type(model) is nn.Sequential


def test_what_is_like_a_sequence_stays_like_it():
    """Slices and sums are sequences too; a subclass keeps what it can."""
    class Stage(nn.Sequential):
        def channels(self) -> int:
            return self[0].out_channels

    model = Stage(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fuse_(model)
    assert isinstance(model, Stage) and isinstance(model, FusedSequential) and model.channels() == 4
    x = torch.randn(2, 3, 5, 5)
    assert fused_calls(model[1:], model[0](x)) == [model[1]] and fused_calls(model[:2], x) == []
    assert type(unfuse_(model)) is Stage


def test_a_subclass_of_the_fused_sequence_stays_what_it_is():
    class Stage(FusedSequential):
        pass

    model = Stage(nn.Conv2d(3, 4, 1), BatchNorm2d(4), nn.ReLU())
    fuse_(model)
    assert len(fused_calls(model, torch.randn(2, 3, 5, 5))) == 1
    assert type(copy.deepcopy(model)) is Stage and type(unfuse_(model)) is Stage


@pytest.mark.parametrize("name", ["resnet18", "vgg_small"])
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model = MODELS[name][0]() if name == "vgg_small" else models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    fuse_(model)
    twin, x = copy.deepcopy(model), torch.randn(3, 3, 40, 40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    torch._dynamo.reset()
