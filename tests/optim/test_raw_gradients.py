"""Gradients that masked layers hand over unmasked: the same training bit for bit, and nobody gets them by mistake."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from mixed_model import assert_equal_parameters, backward, mixed_model, train
from torch import nn

from grasp_sparse import optim
from grasp_sparse.nn import MaskedLinear

MAKE = {
    "SGD": lambda p, **options: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, **options),
    "AdamW": lambda p, **options: optim.AdamW(p, lr=1e-2, **options),
}
STOCK = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def masked_layers(model: nn.Module) -> list[nn.Module]:
    return [model[0], model[7]]


def is_masked(model: nn.Module) -> list[bool]:
    """Of each masked layer, whether a backward pass leaves its gradient zero where pruned."""
    model.zero_grad()
    backward(model, torch.Generator().manual_seed(3))
    found = [not layer.weight.grad[~layer.mask].any() for layer in masked_layers(model)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("during_backward", [False, True], ids=["step", "during_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_trains_the_same_bit_for_bit_and_like_torch(name, dtype, during_backward):
    models = []
    for raw in (False, True):
        model = mixed_model(dtype)
        masks = optim.layer_masks(model)
        optimizer = MAKE[name](model.parameters(), masks=masks, raw_gradients=raw, during_backward=during_backward)
        train(model, optimizer, 10)
        models.append((model, optimizer))
    assert_equal_parameters(models[0][0], models[1][0])
    states = [optimizer.state_dict()["state"] for _, optimizer in models]
    assert all(torch.equal(states[0][p][key], states[1][p][key]) for p in states[0] for key in states[0][p])
    stock = mixed_model(dtype)
    train(stock, STOCK[name](stock.parameters()), 10)
    tolerance = dict(rtol=1e-3, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    assert_equal_parameters(models[1][0], stock, **tolerance)
    assert all((layer.weight[~layer.mask] == 0).all() for layer in masked_layers(models[1][0]))


@every
def test_accumulated_gradients_are_masked_once_they_are_used(make):
    models = []
    for raw in (False, True):
        model = mixed_model()
        optimizer = make(model.parameters(), masks=optim.layer_masks(model), raw_gradients=raw)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for _ in range(4):
                backward(model, generator)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        models.append(model)
    assert_equal_parameters(*models)


@every
def test_infinite_gradients_of_pruned_weights_do_nothing(make):
    layer = MaskedLinear.from_dense(nn.Linear(20, 8), torch.rand(8, 20) < 0.5)
    optimizer = make(layer.parameters(), masks=optim.layer_masks(layer), raw_gradients=True)
    for poison in (torch.nan, torch.inf):
        optimizer.zero_grad()
        (layer._weight_and_bias()[0] * torch.where(layer.mask, 1.0, poison)).sum().backward()
        assert not layer.weight.grad[~layer.mask].isfinite().any()
        optimizer.step()
        assert (layer.weight[~layer.mask] == 0).all() and layer.weight.isfinite().all()
        assert all(s.isfinite().all() for s in optimizer.state[layer.weight].values())


@every
def test_only_where_it_was_asked_for(make):
    model = mixed_model()
    assert is_masked(model) == [True, True]
    ordinary = make(model.parameters(), masks=optim.layer_masks(model))
    assert is_masked(model) == [True, True]
    del ordinary
    first = masked_layers(model)[0]
    optimizer = make(model.parameters(), masks={first.weight: first.mask}, raw_gradients=True)
    assert is_masked(model) == [False, True]
    optimizer.set_masks(optim.layer_masks(model))
    assert is_masked(model) == [False, False]
    optimizer.set_masks({})
    assert is_masked(model) == [True, True]
    with pytest.raises(ValueError, match="Expected masks with raw_gradients"):
        make(model.parameters(), raw_gradients=True)


@every
def test_it_ends_with_the_optimizer(make):
    model = mixed_model()
    optimizer = make(model.parameters(), masks=optim.layer_masks(model), raw_gradients=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert is_masked(model) == [False, False]
    del optimizer, scheduler
    gc.collect()
    assert is_masked(model) == [True, True]
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert all((layer.weight[~layer.mask] == 0).all() for layer in masked_layers(model))


@every
def test_another_optimizer_is_refused_and_changes_nothing(make):
    model = mixed_model()
    optimizer = make(model.parameters(), masks=optim.layer_masks(model), raw_gradients=True)
    before = copy.deepcopy(model)
    for other in (torch.optim.SGD(model.parameters(), lr=0.1), make(model.parameters())):
        backward(model, torch.Generator().manual_seed(0))
        with pytest.raises(RuntimeError, match="Expected the optimizer with raw_gradients"):
            other.step()
        assert_equal_parameters(model, before)
    optimizer.step()
    bystander = nn.Linear(3, 3)  # its optimizer is none of our business
    bystander(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(bystander.parameters(), lr=0.1).step()


@every
def test_copies_and_pickles_of_the_model_mask_for_themselves(make):
    model = mixed_model()
    optimizer = make(model.parameters(), masks=optim.layer_masks(model), raw_gradients=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_masked(other) == [True, True]
    assert is_masked(model) == [False, False]
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert is_masked(twin) == [False, False]
    train(model, optimizer, 3)
    train(twin, twin_optimizer, 3)
    assert_equal_parameters(model, twin)


@every
def test_a_mask_or_a_weight_that_the_optimizer_does_not_have_is_applied_by_the_layer(make):
    model = mixed_model()
    optimizer = make(model.parameters(), masks=optim.layer_masks(model), raw_gradients=True)
    conv, linear = masked_layers(model)
    conv.mask = conv.mask.clone()
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    assert is_masked(model) == [True, True]
    del optimizer


@every
def test_no_hook_is_left_on_the_weight_so_the_layer_costs_what_a_dense_one_does(make):
    layer = MaskedLinear.from_dense(nn.Linear(6, 4), torch.rand(4, 6) < 0.5)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight._backward_hooks
    optimizer = make(layer.parameters(), masks=optim.layer_masks(layer), raw_gradients=True)
    layer(torch.randn(3, 6))
    assert not layer.weight._backward_hooks
    del optimizer
    gc.collect()
    layer(torch.randn(3, 6))
    assert len(layer.weight._backward_hooks) == 1


@every
def test_gradients_that_are_differentiated_again_are_raw_too(make):
    layer = MaskedLinear.from_dense(nn.Linear(6, 4).double(), torch.rand(4, 6) < 0.5)
    optimizer = make(layer.parameters(), masks=optim.layer_masks(layer), raw_gradients=True)
    (grad,) = torch.autograd.grad(layer(torch.randn(3, 6).double()).square().sum(), layer.weight, create_graph=True)
    assert grad[~layer.mask].all()
    grad.square().sum().backward()
    optimizer.step()
    assert not layer.weight[~layer.mask].any()


def test_a_compiled_layer_masks():
    torch._dynamo.reset()
    layer = MaskedLinear.from_dense(nn.Linear(6, 4), torch.rand(4, 6) < 0.5)
    optimizer = optim.SGD(layer.parameters(), lr=0.1, masks=optim.layer_masks(layer), raw_gradients=True)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(3, 6)).square().sum().backward()
    assert not layer.weight.grad[~layer.mask].any() and layer.weight.grad[layer.mask].any()
    optimizer.step()
    torch._dynamo.reset()
