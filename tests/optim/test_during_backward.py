"""Updating during the backward pass: the same bits as a step after it, no gradient left, and misuse is told."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from mixed_model import assert_equal_parameters, backward, mixed_model, train
from torch import nn

from grasp_sparse import optim

MAKE = {
    "SGD": lambda p, **options: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, **options),
    "AdamW": lambda p, **options: optim.AdamW(p, lr=1e-2, **options),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


class Tied(nn.Module):
    """One weight used twice, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@every
def test_equals_the_step_after_backward_bit_for_bit(make):
    models = []
    for during_backward in (False, True):
        model = mixed_model(torch.float32)
        optimizer = make(model.parameters(), masks=optim.layer_masks(model), during_backward=during_backward)
        train(model, optimizer, 10, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        models.append((model, optimizer.state_dict()))
    assert_equal_parameters(models[0][0], models[1][0])
    after, during = (state["state"] for _, state in models)
    assert all(torch.equal(after[p][key], during[p][key]) for p in after for key in after[p]) and after.keys() == during.keys()


@every
def test_shared_parameters_are_updated_once_with_their_whole_gradient(make):
    models = []
    for during_backward in (False, True):
        torch.manual_seed(0)
        model = Tied()
        optimizer = make(model.parameters(), during_backward=during_backward)
        for _ in range(5):
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_equal_parameters(*models)


@every
def test_no_gradient_outlives_its_update(make):
    model = mixed_model()
    optimizer = make(model.parameters(), during_backward=True)
    alive = []

    def count(_):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():  # runs after the update of the same parameter
        parameter.register_post_accumulate_grad_hook(count)
    backward(model, torch.Generator().manual_seed(0))
    assert alive == [0] * len(list(model.parameters()))
    optimizer.step()


@every
def test_closures_groups_and_loaded_state(make):
    """A closure makes the backward pass; a group that is added later and a loaded state count as well."""
    models = []
    for during_backward in (False, True):
        model = mixed_model()
        optimizer = make(model[0].parameters(), during_backward=during_backward)
        optimizer.add_param_group(dict(params=list(model[2:].parameters()), lr=0.01))
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

            def closure(model=model, optimizer=optimizer, generator=generator):
                optimizer.zero_grad()
                backward(model, generator)

            optimizer.step(closure)
        models.append(model)
    assert_equal_parameters(*models)
    assert not torch.equal(models[0][7].weight, mixed_model()[7].weight)


@every
def test_a_second_backward_before_step_is_refused_and_changes_nothing(make):
    weight = torch.ones(3, requires_grad=True)
    optimizer = make([weight], during_backward=True)
    weight.sum().backward()
    once = weight.detach().clone()
    with pytest.raises(RuntimeError, match="Expected one backward pass to a step"):
        weight.sum().backward()
    assert torch.equal(weight, once) and weight.grad is None
    optimizer.step()
    weight.sum().backward()
    assert not torch.equal(weight, once)


@every
def test_two_optimizers_of_one_parameter_are_refused(make):
    weight = torch.ones(3, requires_grad=True)
    optimizers = [make([weight], during_backward=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="another optimizer"):
        weight.sum().backward()
    for optimizer in optimizers:
        optimizer.stop_during_backward()


@every
def test_a_gradient_scaler_is_refused(make):
    weight = torch.ones(3, requires_grad=True)
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        optimizer = make([weight], during_backward=True)
        scaler.scale(weight.sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="Expected no GradScaler"):
            scaler.step(optimizer)
        del optimizer


@every
def test_a_gradient_scaler_works_without(make):
    weights = []
    for scaler in (torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)):
        weight = torch.ones(3, requires_grad=True)
        optimizer = make([weight])
        scaler.scale((weight * 0.5).sum()).backward()
        scaler.step(optimizer)
        weights.append(weight.detach())
    assert torch.equal(*weights) and (weights[0] != 1).all()


@every
def test_gradients_that_no_hook_saw_are_told(make):
    frozen, weight = torch.ones(3, requires_grad=False), torch.ones(3, requires_grad=True)
    optimizer = make([frozen, weight], during_backward=True)
    frozen.requires_grad_()
    (frozen + weight).sum().backward()
    with pytest.raises(RuntimeError, match="Expected no gradients left"):
        optimizer.step()


@every
def test_hooks_end_with_the_optimizer_or_on_request(make):
    weight = torch.ones(3, requires_grad=True)
    optimizer = make([weight], during_backward=True)
    optimizer.stop_during_backward()
    weight.sum().backward()
    assert (weight == 1).all() and (weight.grad == 1).all()
    optimizer.step()
    assert (weight != 1).all()

    weight = torch.ones(3, requires_grad=True)
    optimizer = make([weight], during_backward=True)
    del optimizer
    gc.collect()
    weight.sum().backward()
    assert (weight == 1).all() and (weight.grad == 1).all()


@every
def test_a_copy_updates_its_own_parameters(make):
    model = mixed_model()
    optimizer = make(model.parameters(), during_backward=True)
    train(model, optimizer, 2)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model)
    train(other, other_optimizer, 2)
    assert_equal_parameters(model, before)
    train(model, optimizer, 2)
    assert_equal_parameters(model, other)


def test_a_second_backward_pass_through_a_retained_graph_notices():
    """The update happens inside the backward pass: what still needs the old weight is told, as after any step."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1, during_backward=True)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
