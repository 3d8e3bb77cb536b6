"""What layers are given when a model runs on an example, and random data like it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_net import Net, ReadsWeight, X
from torch import nn
from torch.nn.utils import parametrize

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


class TestWhoseWeightIsRead:
    def test_calls_do_not_count_what_else_the_model_reads_does(self):
        assert layer_inputs(Net(), X).read == set()
        assert layer_inputs(nn.Sequential(Net(), ReadsWeightLater()), X).read == {"1.fc"}
        model, x = ReadsWeight(), torch.randn(3, 8)
        seen = layer_inputs(model, x)
        assert seen.read == {"wo"} and seen.keys() == {"", "wi", "wo"}
        assert type(model.wo._parameters) is dict and not model.wo._forward_hooks and not model.wo._forward_pre_hooks

    @pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
    @pytest.mark.parametrize("prepend", [False, True])
    def test_hooks_of_the_layer_are_outside(self, register, prepend):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        getattr(model[1], register)(lambda layer, *_: print(layer.weight.dtype), prepend=prepend)
        assert layer_inputs(model, torch.randn(3, 8)).read == {"1"}

    def test_parameters_of_the_whole_model_may_be_looked_through(self):
        class Looks(Net):
            def forward(self, x):
                assert len(self.state_dict()) == len(list(self.parameters())) == 6
                return super().forward(x.to(next(self.parameters()).dtype))

        assert layer_inputs(Looks(), X).read == set()

    def test_a_call_that_fails_ends(self):
        class Tries(nn.Sequential):
            def forward(self, x):
                try:
                    return self[0](x[:, 1:])
                except RuntimeError:
                    return x @ self[0].weight.t()

        assert layer_inputs(Tries(nn.Linear(8, 8)), torch.randn(3, 8)).read == {"0"}

    def test_layers_are_what_they_were(self):
        class Curious(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.scaled = nn.Linear(8, 8), parametrize.register_parametrization(nn.Linear(8, 8), "weight", nn.Tanh())

            def forward(self, x):
                assert type(self.fc) is nn.Linear and type(self.fc.weight) is nn.Parameter
                other, parameters = copy.deepcopy(self.fc), pickle.loads(pickle.dumps(self.fc._parameters))
                assert torch.equal(other.weight, parameters["weight"]) and other.weight is not self.fc.weight
                parametrize.register_parametrization(other, "weight", nn.Tanh())
                self.fc.weight = nn.Parameter(self.fc.weight.detach() * 2)
                return other(x) @ self.scaled.weight + self.fc(x)

        model = Curious()
        before = model.fc.weight.detach().clone()
        assert layer_inputs(model, torch.randn(3, 8)).read == {"fc"} and torch.equal(model.fc.weight, before)

    @pytest.mark.parametrize("around", ["nothing", "the model", "a part"])
    def test_compiled_models(self, around):
        torch._dynamo.reset()
        model = ReadsWeight()
        if around == "nothing":
            model.compile(backend="eager")
        else:
            model = torch.compile(model, backend="eager", fullgraph=True)
        model = nn.Sequential(model) if around == "a part" else model
        wanted = {"nothing": "wo", "the model": "_orig_mod.wo", "a part": "0._orig_mod.wo"}[around]
        assert layer_inputs(model, torch.randn(3, 8)).read == {wanted}
        torch._dynamo.reset()

    @pytest.mark.filterwarnings("ignore:.torch.jit")
    def test_scripted_parts_are_run_unseen(self):
        model = nn.Sequential(torch.jit.script(ReadsWeight()), torch.jit.trace(nn.Linear(8, 8), torch.randn(3, 8)), nn.Linear(8, 8))
        seen = layer_inputs(model, torch.randn(3, 8))
        assert seen.read == set() and "2" in seen


class ReadsWeightLater(nn.Module):
    """After the call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 10)

    def forward(self, x):
        return self.fc(x) + self.fc.weight.mean()


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
