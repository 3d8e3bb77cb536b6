"""A sparse model may be edited, taken apart and watched like the dense one with the same masks: fusing shows nowhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from fused_calls import fused_calls
from grasp_sparse.fusion import fuse_
from grasp_sparse.pruning import make_masks
from grasp_sparse.surgery import sparsify_
from pruned_models import pruned_copy

X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """The sparse model, of which a norm, a convolution of blocks and a linear layer apply the ReLU behind them; the dense one."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4),
    ).double()  # fmt: skip
    nn.init.uniform_(model[1].bias, -0.5, 0.5)
    masks = make_masks({name: p.detach().abs() for name, p in model.named_parameters() if p.dim() > 1}, 0.5, "block(2, 2)")
    dense = pruned_copy(model, masks)
    sparsify_(model, masks, max_density=1.0)
    return model, dense


def residual(block: type[nn.Module] = BasicBlock) -> tuple[nn.Module, nn.Module]:
    """torchvision's ResNet fused, and as it was."""
    dense = models.ResNet(block, [1, 1, 1, 1], num_classes=5).double()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model = copy.deepcopy(dense)
    fuse_(model)
    return model, dense


def check_equal(model: nn.Module, dense: nn.Module) -> None:
    """In training, its gradient included, and in evaluation."""
    for mode in (True, False):
        results = []
        for each in (model, dense):
            x = X.clone().requires_grad_()
            y = each.train(mode)(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(*results)


def replace(name: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def edit(model: nn.Module) -> nn.Module:
        torch.manual_seed(2)  # the same layer in both models
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make().double())
        return model

    return edit


def gelus(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.GELU())
    return model


def inserted(model: nn.Sequential) -> nn.Sequential:
    return model.insert(8, nn.Tanh())


def removed(model: nn.Sequential) -> nn.Sequential:
    del model[2]
    return model


def own_forward_of_the_relu(model: nn.Sequential) -> nn.Sequential:
    model[8].forward = lambda x: x.clamp(-1, 1)
    return model


def own_forward_of_the_layer(model: nn.Sequential) -> nn.Sequential:
    forward = model[7].forward
    model[7].forward = lambda x: forward(x) - 1
    return model


def changing_hook(model: nn.Sequential) -> nn.Sequential:
    model[1].register_forward_hook(lambda _, inputs, y: y - 1)
    return model


SEQUENTIAL_EDITS = {
    "another linear layer": replace("7", lambda: nn.Linear(32, 16)),
    "another convolution": replace("3", lambda: nn.Conv2d(8, 8, 3)),
    "another norm": replace("1", lambda: nn.GroupNorm(2, 8)),
    "another activation": replace("8", nn.Tanh),
    "synchronised norms": nn.SyncBatchNorm.convert_sync_batchnorm,
    "GELU for every ReLU": gelus,
    "a layer between": inserted,
    "a ReLU less": removed,
    "a forward set on a ReLU": own_forward_of_the_relu,
    "a forward set on a layer": own_forward_of_the_layer,
    "a hook that changes the output": changing_hook,
}
RESIDUAL_EDITS = {
    "another activation of a block": replace("layer1.0.relu", nn.SiLU),
    "another activation of the network": replace("relu", nn.SiLU),
    "another norm of a block": replace("layer2.0.bn1", lambda: nn.GroupNorm(2, 128)),
    "another norm before an add": replace("layer3.0.bn2", lambda: nn.GroupNorm(2, 256)),
    "another norm of the network": replace("bn1", lambda: nn.GroupNorm(2, 64)),
    "synchronised norms": nn.SyncBatchNorm.convert_sync_batchnorm,
    "GELU for every ReLU": gelus,
}


@pytest.mark.parametrize("edit", SEQUENTIAL_EDITS.values(), ids=SEQUENTIAL_EDITS)
def test_an_edited_sequence(edit):
    model, dense = map(edit, pair())
    check_equal(model, dense)
    assert len(fused_calls(model, X)) == (0 if edit is gelus else 2)  # the other pairs still fuse


@pytest.mark.parametrize("edit", RESIDUAL_EDITS.values(), ids=RESIDUAL_EDITS)
def test_an_edited_residual_network(edit):
    check_equal(*map(edit, residual()))


@pytest.mark.parametrize("edit", [gelus, replace("layer2.0.relu", nn.SiLU)], ids=["GELU for every ReLU", "another activation"])
def test_an_edited_network_of_bottlenecks(edit):
    check_equal(*map(edit, residual(Bottleneck)))


@pytest.mark.parametrize("stop", range(11))  # nothing, and all of it, too
def test_slices(stop):
    model, dense = pair()
    check_equal(model[:stop], dense[:stop])
    x = dense[:stop](X)
    torch.testing.assert_close(model[stop:](x.clone()), dense[stop:](x.clone()))


def test_layers_called_one_by_one_and_tapped():
    """A layer alone applies no ReLU."""
    taps = []
    for model in pair():
        x, seen = X, []
        for layer in model:
            x = layer(x)
            seen.append(x.clone())
        taps.append(seen)
    torch.testing.assert_close(*taps)


def watched(model: nn.Module, module: nn.Module, register: str) -> list[Tensor]:
    """What a hook on ``module`` is given in a forward and backward; copies, for a ReLU in place changes what it was given."""
    seen: list[Tensor] = []

    def note(_, *values) -> None:
        value = values[-1]
        seen.append((value[0] if isinstance(value, tuple) else value).clone())

    handle = getattr(module, register)(note)
    model(X.clone().requires_grad_()).square().sum().backward()
    handle.remove()
    return seen


FORWARD = ["register_forward_hook", "register_forward_pre_hook"]
BACKWARD = ["register_full_backward_hook", "register_full_backward_pre_hook"]
PLACES = {1: FORWARD + BACKWARD, 2: FORWARD + BACKWARD, 3: FORWARD, 4: FORWARD, 7: FORWARD + BACKWARD, 8: FORWARD + BACKWARD}


@pytest.mark.parametrize("place, register", [(place, register) for place, kinds in PLACES.items() for register in kinds])
def test_hooks_registered_afterwards(place, register):
    """torch itself refuses backward hooks around a ReLU in place."""
    model, dense = pair()
    got, want = (watched(each, each[place], register) for each in (model, dense))
    assert len(want) == 1
    torch.testing.assert_close(got, want)
    assert len(fused_calls(model, X)) == 3  # now that they are gone


@pytest.mark.parametrize("register", FORWARD)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("name", ["bn1", "relu", "layer2.0.bn1", "layer2.0.bn2", "layer2.0.relu"])
def test_hooks_registered_afterwards_in_a_residual_network(block, name, register):
    got, want = (watched(model, model.get_submodule(name), register) for model in residual(block))
    assert len(want) >= 1
    torch.testing.assert_close(got, want)


def test_a_hook_on_all_modules():
    seen = []
    for model in pair():
        here: list[Tensor] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, _, y, here=here: here.append(y.clone()))
        try:
            model(X)
        finally:
            handle.remove()
        seen.append(here)
    assert len(seen[1]) == 11
    torch.testing.assert_close(*seen)


def test_an_ordinary_forward_calls_no_relu(monkeypatch):
    """In training and evaluation, in the model, its copy and a slice."""
    called, forward = [], nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: called.append(self) or forward(self, x))
    model, dense = pair()
    for each in (model, model.eval(), copy.deepcopy(model), model[:9], residual()[0]):
        each(X)
        assert called == []
    dense(X)
    assert called == [dense[2], dense[4], dense[8]]
