"""The optimizer of a run whose model has masked layers: masks as it reads gradients, and otherwise is torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grasp_sparse import optim
from grasp_sparse.nn import MaskedConv2d, MaskedLinear
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.optimizer import make_optimizer, restore_optimizer
from grasp_sparse.train.step import loss_function, step_options, training_step

CONFIGS = {"sgd": {}, "adamw": dict(optimizer="adamw", lr=1e-3, momentum=0.9)}


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)

    def masked(kind, layer):
        return kind.from_dense(layer, torch.rand(layer.weight.shape, generator=generator) < 0.5)

    torch.manual_seed(0)
    conv, linear = masked(MaskedConv2d, nn.Conv2d(3, 8, 3)), masked(MaskedLinear, nn.Linear(8, 4))
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def _train(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)
        loss, _ = training_step(model, optimizer, loss_function(config), x * scale, y, step_options(config))
    return loss


def _torch_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The one that a model of the same parameters gets which has no masked layers."""
    return make_optimizer(config, nn.ParameterList(model.parameters()))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_trains_as_torch_does_and_keeps_pruned_weights_at_zero(changes):
    config, ours, theirs = TrainConfig(**changes), _model(), _model()
    optimizers = make_optimizer(config, ours), _torch_optimizer(config, theirs)
    assert [type(o).__module__.split(".")[0] for o in optimizers] == ["grasp_sparse", "torch"]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        _train(config, model, optimizer, 8)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    assert all((layer.weight[~layer.mask] == 0).all() for layer in (ours[0], ours[4]))


RAW = {"plain": ({}, True), "clipped": (dict(clip_norm=1.0), False), "float16": (dict(precision="fp16"), False)}


@pytest.mark.parametrize("changes, raw", RAW.values(), ids=RAW)
def test_gradients_come_unmasked_unless_somebody_looks_at_them_before(changes, raw):
    config, model = TrainConfig(**changes), _model()
    _train(config, model, make_optimizer(config, model), 1)
    assert all(layer.weight.grad[~layer.mask].any() == raw for layer in (model[0], model[4]))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_without_a_finite_loss_nothing_moves(changes):
    config, model = TrainConfig(**changes), _model()
    optimizer = make_optimizer(config, model)
    _train(config, model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    assert not _train(config, model, optimizer, 1, scale=torch.inf).isfinite()
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(value, before[1][p][name]) for p, state in after.items() for name, value in state.items())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_takes_up_what_torch_s_optimizer_has_saved(changes):
    config, before = TrainConfig(**changes), _model()
    theirs = _torch_optimizer(config, before)
    _train(config, before, theirs, 3)
    after, saved = copy.deepcopy(before), copy.deepcopy(theirs.state_dict())
    ours = make_optimizer(config, after)
    restore_optimizer(config, ours, saved)
    assert isinstance(ours, (optim.SGD, optim.AdamW))
    for model, optimizer in ((before, theirs), (after, ours)):
        _train(config, model, optimizer, 2)
    for mine, reference in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
