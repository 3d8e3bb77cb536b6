"""A scratch copy shares nothing with the model, and the global random state comes back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from grasp_sparse.nested import first_tensor
from grasp_sparse.pruning import prune
from grasp_sparse.scratch import call_model, move, preserved_rng, scratch_copy


def draw() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(), random.random()


def test_random_state_is_restored_and_a_seed_decides_what_is_drawn_inside():
    draw()
    with preserved_rng(3):
        first = draw()
    with preserved_rng():
        following = draw()
    with preserved_rng(3):
        assert draw() == first
    assert draw() == following


def test_the_copy_keeps_ties_and_asks_for_the_gradients_that_the_model_does():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    with torch.no_grad(), scratch_copy(model, dtype=torch.float64) as scratch:
        assert torch.is_grad_enabled() and [p.requires_grad for p in scratch.parameters()] == [True, True, False]
        assert scratch[0].weight is scratch[1].weight and scratch[0].weight.dtype == torch.float64
        scratch[0].weight.data.zero_()
    assert model[0].weight.dtype == torch.float32 and model[0].weight.all() and model[0].weight.requires_grad


def test_complex_buffers_stay_complex_in_another_dtype():
    model = nn.Linear(3, 3)
    model.register_buffer("rotation", torch.tensor([1j, -1.0]))
    with scratch_copy(model, dtype=torch.float64) as scratch:
        assert scratch.weight.dtype == torch.float64 and torch.equal(scratch.rotation, model.rotation)


def test_the_callers_forward_hooks_fire_on_the_copy():
    model, seen = nn.Linear(3, 3), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(module))
    with scratch_copy(model) as scratch:
        scratch(torch.zeros(1, 3))
    assert seen == [scratch]


def test_a_model_that_cannot_be_copied_is_explained():
    model = nn.Linear(3, 3)
    model.cached = model.weight * 2
    with pytest.raises(ValueError, match=r"copy\.deepcopy"), scratch_copy(model):
        pass


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyBatchNorm1d(affine=False)], ids=["weight", "buffer"])
def test_lazy_modules_have_to_run_first(lazy):
    model, x = nn.Sequential(nn.Linear(6, 8), lazy()), torch.randn(4, 6)
    for use in (
        lambda: prune(model, [(x, torch.arange(4) % 3)], 0.5),
        lambda: prune(model, criterion="magnitude"),
        lambda: prune(model, criterion="magnitude", budget="flops", example_input=x),
    ):
        with pytest.raises(ValueError, match=r"whose weights have shapes, got Lazy.*: run one forward first \(1\)"):
            use()
    model(x)
    assert "0.weight" in prune(model, [(x, torch.arange(4) % 3)], 0.5)


def test_nested_inputs_are_moved_and_measured():
    data = {"a": [torch.zeros(2, dtype=torch.int64), (torch.zeros(3),)], "b": "text"}
    moved = move(data, torch.device("cpu"), torch.float64)
    assert moved["a"][0].dtype == torch.int64 and moved["a"][1][0].dtype == torch.float64 and moved["b"] == "text"
    assert first_tensor({"n": 1, "x": (None, torch.zeros(7))}).shape == (7,)
    with pytest.raises(ValueError, match="got str"):
        first_tensor("nothing")
    assert call_model(nn.Linear(2, 1).double(), torch.zeros(4, 2)).dtype == torch.float64
