"""torch.func and torch.jit.trace see in a fused model what they see in torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, stack_module_state, vmap

from grasp_sparse.fusion import fuse_
from grasp_sparse.nn import BatchNorm2d, FusedSequential

# What torch says of its own layers here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def pair(training: bool) -> tuple[nn.Module, nn.Module]:
    """A fused model of norm, ReLU and all poolings, and what it was made of."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=not training), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4, track_running_stats=not training), nn.ReLU(),
        nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double().train(training)  # fmt: skip
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, -1, 1)
    ours = copy.deepcopy(stock)
    assert len(fuse_(ours)) == 2 and isinstance(ours, FusedSequential)
    return ours, stock


def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ensemble(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    models = [copy.deepcopy(model) for _ in range(3)]
    for index, member in enumerate(models):
        for parameter in member.parameters():
            parameter.data.mul_(1 + index)
    parameters, buffers = stack_module_state(models)
    return vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)


USES = {
    "jacrev": lambda model, x: jacrev(model)(x),
    "jacfwd": lambda model, x: jacfwd(model)(x),
    "hessian": lambda model, x: hessian(lambda x: model(x).square().sum())(x[:2, :, :4, :4]),
    "grad": lambda model, x: grad(lambda x: model(x).square().sum())(x),
    "vmap": lambda model, x: vmap(model)(torch.stack([x, 2 * x])),
    "vmap over the last": lambda model, x: vmap(model, in_dims=-1)(torch.stack([x, 2 * x], -1)),
    "ensemble": ensemble,
    "functionalize": lambda model, x: functionalize(model)(x),
    "trace": lambda model, x: torch.jit.trace(model, x)(x),
    "trace without gradients": lambda model, x: torch.no_grad()(torch.jit.trace)(model, x)(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use", USES)
def test_equals_torch(use, training, layout):
    (ours, stock), x = pair(training), LAYOUTS[layout](images())
    torch.testing.assert_close(USES[use](ours, x), USES[use](stock, x))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_with_a_residual(training):
    """Also where only the residual is mapped."""
    torch.manual_seed(0)
    ours = BatchNorm2d(3, track_running_stats=not training).double().train(training)
    x, residuals = images(), torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    got = vmap(lambda x, residual: ours(x, residual, relu=True), in_dims=(None, 0))(x, residuals)
    for y, residual in zip(got, residuals, strict=True):
        torch.testing.assert_close(y, ours(x, residual, relu=True))


def test_running_statistics_follow_in_an_ensemble():
    ours, stock = pair(training=False)
    x = images()
    results = []
    for model in (ours.train(), stock.train()):
        parameters, buffers = stack_module_state([copy.deepcopy(model) for _ in range(2)])
        vmap(lambda p, b, x, model=model: functional_call(model, (p, b), (x,)))(parameters, buffers, torch.stack([x, 2 * x]))
        results.append(buffers)
    assert results[0].keys() == results[1].keys() and results[0]["0.num_batches_tracked"].tolist() == [1, 1]
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value)
