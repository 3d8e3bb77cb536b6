"""What layers are given when a model runs on an example, and random data like it."""

from __future__ import annotations

import pytest
import torch
from small_net import Net, X

from grasp_sparse.planning import layer_inputs
from grasp_sparse.planning.inputs import LayerInput, describe_input


def test_what_layers_are_given():
    net = Net()
    seen = layer_inputs(net, X)
    assert seen["first"] == {LayerInput((4, 3, 6, 6), "nchw", torch.float32, False): 1}
    assert seen["second"] == {LayerInput((4, 8, 6, 6), "nchw", torch.float32, True): 2}
    assert next(iter(layer_inputs(net, X.to(memory_format=torch.channels_last))["first"])).layout == "channels_last"


def test_inputs_by_name_are_seen():
    class ByName(Net):
        def forward(self, x):
            x = self.first(input=x).relu()
            return self.head(input=self.second(self.second(x).relu()).mean((2, 3)))

    assert layer_inputs(ByName(), X).keys() == {"", "first", "second", "head"}
    for name, given in layer_inputs(Net(), X).items():
        assert layer_inputs(ByName(), X)[name] == given


def test_behind_frozen_layers_no_gradient_is_needed():
    net = Net()
    net.first.requires_grad_(False)
    assert [given.needs_grad for given in layer_inputs(net, X)["second"]] == [False, True]  # called twice
    assert not net.first.weight.requires_grad and net.second.weight.requires_grad


@pytest.mark.parametrize(
    "x, layout",
    [
        (torch.empty(4, 3, 5, 6), "nchw"),
        (torch.empty(4, 3, 5, 6).to(memory_format=torch.channels_last), "channels_last"),
        (torch.empty(4, 1, 5, 6), "nchw"),
        (torch.empty(4, 1, 5, 6).to(memory_format=torch.channels_last), "channels_last"),
        (torch.empty(3, 5, 6, 4).permute(3, 0, 1, 2), "batch-innermost"),
        (torch.empty(4, 6), "row-major"),
        (torch.empty(6, 4).t(), "feature-major"),
        (torch.empty(2, 4, 6), "row-major"),
    ],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_random_data_have_shape_layout_and_gradient_of_the_input(x, layout, needs_grad):
    given = describe_input(x.requires_grad_(needs_grad))
    made = given.random(torch.Generator())
    assert given.layout == layout and describe_input(made) == given
    assert made.stride() == x.stride() and made.is_leaf and made.detach().count_nonzero() == made.numel()
