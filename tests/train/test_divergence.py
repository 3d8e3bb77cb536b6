"""What is named when a loss is not finite: the images, the weight whose gradient was not, or the first layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.divergence import first_non_finite
from grasp_sparse.train.optimizer import make_optimizer
from grasp_sparse.train.step import loss_function, step_options, training_step

_X = torch.ones(2, 4)


class _Root(nn.Module):
    """A layer of somebody's whose output is fine and whose gradient is not a number: infinite times nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 0).sqrt()


class _Between(nn.Module):
    """Computes between its layers, as residual blocks do."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3))


def _found(model: nn.Module, x: Tensor = _X) -> str:
    return first_non_finite(model, x, lambda: model(x))


def test_the_images_are_asked_first() -> None:
    x = _X.clone()
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    assert _found(_net(), x) == "1 nan and 1 inf of 8 values in the images of this batch"


def test_the_first_layer_whose_output_is_not_finite_is_named_with_its_input() -> None:
    model = _net()
    with torch.no_grad():
        model[0].weight.fill_(1e30)
        model[2][0].weight.fill_(1e30)
    found = _found(model)
    assert found.startswith("first in the output of layer 2.0 (Linear): 8 inf of 8 values; its largest input was 4")
    assert found.endswith("e+30")


def test_what_is_computed_between_layers_is_told_from_what_they_compute() -> None:
    model = _Between(lambda x: x / 0)
    assert _found(model) == "first in what enters layer second (Linear), computed by the module around it"


def test_at_the_end_of_a_module_the_module_itself_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.LogSoftmax(1))
    model[1].register_forward_hook(lambda module, given, output: output / 0)
    assert "layer 1 (Sequential)" in _found(model)


def test_the_weight_nearest_the_loss_is_the_one_whose_gradient_failed() -> None:
    """By the steps that training takes: weights before the source are spoilt with it, those behind are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), _Root(), nn.Linear(4, 3))
    config, y = TrainConfig(lr=0.1), torch.tensor([0, 1])
    optimizer = make_optimizer(config, model)
    losses = [float(training_step(model, optimizer, loss_function(config), _X, y)[0]) for _ in range(2)]
    assert losses[0] == losses[0] and losses[1] != losses[1]
    found = _found(model)
    assert found.startswith("the gradient of 1.weight and of 3 parameters before it was not finite"), found


def test_without_a_cause_that_can_be_repeated_it_says_so() -> None:
    assert "every layer's output is finite when the step is repeated" in _found(_net())


def test_hooks_are_gone_afterwards_also_when_the_forward_fails() -> None:
    model = _net()
    with pytest.raises(RuntimeError):
        first_non_finite(model, _X, lambda: model(torch.ones(2, 7)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_without_a_finite_loss_changes_no_weight(optimizer: str, accumulate: int, precision: str) -> None:
    """Or there would be nothing left to repeat the step with. One spoilt image is enough, in whichever part it is."""
    torch.manual_seed(0)
    config = TrainConfig(optimizer=optimizer, accumulate=accumulate, precision=precision, lr=0.1)
    model, y = _net(), torch.tensor([0, 1, 2, 0])
    made, options, loss_fn = make_optimizer(config, model), step_options(config), loss_function(config)
    x = torch.randn(4, 4)
    training_step(model, made, loss_fn, x, y, options)
    before = [parameter.clone() for parameter in model.parameters()]
    x[3, 0] = float("nan")
    loss, _ = training_step(model, made, loss_fn, x, y, options)
    assert not loss.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    x[3, 0] = 1.0
    training_step(model, made, loss_fn, x, y, options)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
