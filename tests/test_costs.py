"""A weight costs the output positions it contributes to, summed over its uses; measuring leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grasp_sparse.costs import weight_costs
from grasp_sparse.weights import find_weights


def test_conv_counts_positions_and_linear_counts_rows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(20, 5))
    assert weight_costs(model, torch.zeros(7, 3, 10, 8)) == {"0.weight": 5 * 4, "2.weight": 4}


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_total_agrees_with_torch_flop_counter(name):
    model = getattr(torchvision.models, name)(num_classes=10)
    image = torch.zeros(1, 3, 64, 64)
    costs = weight_costs(model, image)
    total = sum(weight.parameter.numel() * costs[weight.name] for weight in find_weights(model).weights)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    assert 2 * total == counter.get_total_flops()


def test_several_uses_add_up():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    assert weight_costs(Twice(), torch.zeros(5, 4)) == {"a.weight": 3.0}
    assert weight_costs(Twice(), torch.zeros(5, 6, 4)) == {"a.weight": 18.0}


def test_tuple_and_dict_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.fc(x) + y

    x = torch.zeros(2, 4)
    assert weight_costs(Two(), (x, x)) == weight_costs(Two(), {"x": x, "y": x}) == {"fc.weight": 1.0}


def test_the_model_comes_back_untouched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2)).train()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    weight_costs(model, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_layer_that_is_never_called_costs_nothing_and_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].unused = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"0\.unused\.weight"):
        assert weight_costs(model, torch.zeros(1, 4)) == {"0.weight": 1.0, "0.unused.weight": 0.0}


def test_an_empty_example_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        weight_costs(nn.Linear(4, 4), torch.zeros(0, 4))
