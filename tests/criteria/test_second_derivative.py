"""GraSP of models with operations that torch differentiates once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from grasp_sparse.criteria import score
from small_models import data


class ByDefinition(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3) / 6


class Function(nn.Module):
    """A function of images, or of a layer's outputs, as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class MarkedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def assert_same_scores(model, by_hand, batches):
    before = [type(module) for module in model.modules()]
    scores, expected = score(model, batches, seed=0), score(by_hand, batches, seed=0)
    assert any(value.count_nonzero() for value in scores.values())
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, rtol=1e-9, atol=0)
    assert [type(module) for module in model.modules()] == before


def test_mobilenet_v3_scores_as_with_its_hard_sigmoids_written_out():
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=5).double()
    by_hand = copy.deepcopy(model)
    for module in by_hand.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, ByDefinition())
    assert_same_scores(model, by_hand, [(torch.randn(4, 3, 32, 32), torch.arange(4))])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hard_sigmoid_in_place_is_one(inplace):
    def net(middle):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), middle, nn.Linear(8, 5)).double()

    assert_same_scores(net(nn.Hardsigmoid(inplace)), net(ByDefinition()), [data()])


WITHOUT = {
    "hardsigmoid": F.hardsigmoid,
    "roi_align": lambda x: torchvision.ops.roi_align(x, [x.new_tensor([[0, 0, 4, 4]])] * len(x), 2),
    "embedding_bag": lambda x: F.embedding_bag(torch.zeros(len(x), 1, dtype=torch.long), x.mean((2, 3)), mode="max"),
    "an autograd function whose backward is marked @once_differentiable": MarkedOnce.apply,
}


@pytest.mark.parametrize("operation", WITHOUT)
def test_an_operation_without_a_second_derivative_is_named(operation):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Function(WITHOUT[operation]), nn.Flatten(), nn.LazyLinear(5))
    model(data()[0])
    with pytest.raises(ValueError, match=f"differentiated twice, which GraSP needs, got .* of {operation}: use criterion='snip'"):
        score(model, [data()])
    assert score(model, [data()], "snip").keys() == {"0.weight", "3.weight"}


def test_other_errors_of_the_model_stay_what_they_are():
    def fail(x):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="^of another kind$"):
        score(nn.Sequential(nn.Flatten(), nn.Linear(72, 5), Function(fail)), [data()])
