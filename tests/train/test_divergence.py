"""What is named when numbers are not finite: of a loss the images, weights or first layer; of a state to save the tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.divergence import endless_buffers, first_non_finite, non_finite_state
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


def _trained(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """A model with a batch norm after a step, its optimizer, and averages of it."""
    config = TrainConfig(optimizer=optimizer, lr=0.1)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    made = make_optimizer(config, model)
    training_step(model, made, loss_function(config), torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    return model, made, {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_tensor_of_a_state_is_looked_at_and_named(value: float) -> None:
    seen = set()
    for optimizer in ("sgd", "adamw"):
        model, made, averages = _trained(optimizer)
        assert non_finite_state(model, made, averages) is None
        tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        for name, parameter in model.named_parameters():
            tensors |= {f"{moment} of {name}": tensor for moment, tensor in made.state[parameter].items()}
        tensors |= {f"the moving average of {name}": tensor for name, tensor in averages.items()}
        for name, tensor in tensors.items():
            flat = tensor.detach().view(-1)
            flat[-1], kept = value, flat[-1].clone()
            assert non_finite_state(model, made, averages) == f"1 {'nan' if value != value else 'inf'} of {len(flat)} values in {name}"
            flat[-1] = kept
            seen.add(name)
    assert {"0.weight", "1.running_var", "exp_avg_sq of 2.bias", "momentum_buffer of 1.weight", "the moving average of 1.running_mean"} <= seen


def test_of_many_the_first_is_named_and_the_others_counted() -> None:
    model, made, _ = _trained("sgd")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert non_finite_state(model, made, {}) == "16 nan of 16 values in 0.weight and 5 more tensors"


def test_the_largest_finite_numbers_are_finite() -> None:
    """Their sum is not: nothing may be added up to ask."""
    model, made, _ = _trained("sgd")
    model[0].weight.data.fill_(torch.finfo(torch.float32).max)
    assert non_finite_state(model, made, {}) is None


def test_a_mask_of_minus_infinity_was_so_from_the_beginning() -> None:
    model, made, _ = _trained("sgd")
    model[0].register_buffer("causal", torch.full((2, 2), -float("inf")).triu(1))
    besides = endless_buffers(model)
    averages = {"0.causal": model[0].causal.clone()}
    assert besides == {"0.causal"} and non_finite_state(model, made, averages, besides) is None
    model[0].weight.data[0, 0] = float("nan")
    assert endless_buffers(model) == besides  # weights are no buffers: they may never be so
