"""The optimizers give torch's numbers, to rounding, with every option, and exchange state with torch's."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from mixed_model import assert_equal_parameters, mixed_model, train

from grasp_sparse import optim

TOLERANCE = {torch.float64: dict(rtol=1e-12, atol=1e-12), torch.float32: dict(rtol=1e-3, atol=1e-4)}
IMPLEMENTATIONS = {"foreach": dict(foreach=True), "fused": dict(fused=True)}
SGD_OPTIONS = [  # a loss that is maximized has no end: in small steps rounding does not grow with it
    dict(
        lr=0.005 if maximize else 0.05, momentum=momentum, dampening=dampening, weight_decay=decay,
        nesterov=nesterov, maximize=maximize,
    )
    for momentum, dampening, decay, nesterov, maximize in product((0, 0.9), (0, 0.1), (0, 1e-2), *[(False, True)] * 2)
    if not (nesterov and (momentum == 0 or dampening)) and not (dampening and momentum == 0)
]
ADAMW_OPTIONS = [
    dict(lr=1e-2, betas=betas, eps=eps, weight_decay=decay, maximize=maximize)
    for betas, eps, decay, maximize in product(((0.9, 0.999), (0.5, 0.9)), (1e-8, 1e-3), (0, 0.1), (False, True))
]
CASES = [("SGD", options) for options in SGD_OPTIONS] + [("AdamW", options) for options in ADAMW_OPTIONS]
BOTH = [("SGD", dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)), ("AdamW", dict(lr=1e-2, weight_decay=0.1))]


def _id(value) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}={v}" for key, v in value.items() if v) or "plain"


def pair(name: str, options: dict, dtype: torch.dtype = torch.float64, **implementation):
    """Our model and optimizer, torch's model and optimizer."""
    ours, theirs = mixed_model(dtype), mixed_model(dtype)
    make_ours, make_theirs = getattr(optim, name), getattr(torch.optim, name)
    return (
        ours, make_ours(ours.parameters(), **options, masks=optim.layer_masks(ours)),
        theirs, make_theirs(theirs.parameters(), **options, **implementation),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("name, options", CASES, ids=_id)
def test_twenty_steps(name, options, implementation, dtype):
    ours, our_optimizer, theirs, their_optimizer = pair(name, options, dtype, **implementation)
    train(ours, our_optimizer)
    train(theirs, their_optimizer)
    assert_equal_parameters(ours, theirs, **TOLERANCE[dtype])
    start = mixed_model(dtype)
    assert all(not torch.equal(a, b) for a, b in zip(ours.parameters(), start.parameters(), strict=True))
    for layer in (ours[0], ours[7]):
        assert (layer.weight[~layer.mask] == 0).all()


@pytest.mark.parametrize("name, options", BOTH, ids=_id)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_state_dicts_are_exchanged_with_torch(name, options, implementation):
    ours, our_optimizer, theirs, their_optimizer = pair(name, options, **implementation)
    train(ours, our_optimizer)
    train(theirs, their_optimizer)
    our_state, their_state = copy.deepcopy(our_optimizer.state_dict()), copy.deepcopy(their_optimizer.state_dict())
    assert our_state["param_groups"][0].keys() == their_state["param_groups"][0].keys()
    assert [s.keys() for s in our_state["state"].values()] == [s.keys() for s in their_state["state"].values()]

    swapped_ours, swapped_our_optimizer, swapped_theirs, swapped_their_optimizer = pair(name, options, **implementation)
    swapped_ours.load_state_dict(theirs.state_dict())
    swapped_our_optimizer.load_state_dict(their_state)
    swapped_theirs.load_state_dict(ours.state_dict())
    swapped_their_optimizer.load_state_dict(our_state)
    for model, optimizer in (
        (ours, our_optimizer), (theirs, their_optimizer),
        (swapped_ours, swapped_our_optimizer), (swapped_theirs, swapped_their_optimizer),
    ):
        train(model, optimizer, seed=2)
    for model in (theirs, swapped_ours, swapped_theirs):
        assert_equal_parameters(ours, model, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name, options", BOTH, ids=_id)
def test_groups_schedules_and_tensor_rates(name, options):
    """Two groups, the second added later, each with its own options; a learning rate that is a tensor and changes."""
    models = []
    for module in (optim, torch.optim):
        model = mixed_model()
        optimizer = getattr(module, name)(model[0].parameters(), **{**options, "lr": torch.tensor(0.02, dtype=torch.float64)})
        optimizer.add_param_group(dict(params=list(model[2:].parameters()), lr=0.01, weight_decay=0.0))
        train(model, optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        models.append(model)
    assert_equal_parameters(*models, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name, options", BOTH, ids=_id)
def test_closure_and_parameters_without_gradients(name, options):
    models = []
    for module in (optim, torch.optim):
        model = mixed_model()
        optimizer = getattr(module, name)(model.parameters(), **options)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model[0](torch.ones(1, 2, 8, 8, dtype=torch.float64)).square().mean()  # the other layers take no part
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses[2] < losses[0]
        models.append(model)
    assert_equal_parameters(*models, **TOLERANCE[torch.float64])
    assert_equal_parameters(models[0][2:], mixed_model()[2:])


@pytest.mark.parametrize("name, options", BOTH, ids=_id)
def test_half_precision_runs_the_reference(name, options):
    weights = []
    for module in (optim, torch.optim):
        weight = torch.linspace(-1, 1, 40, dtype=torch.bfloat16).requires_grad_()
        optimizer = getattr(module, name)([weight], **options)
        for step in range(5):
            weight.grad = torch.cos(weight.detach() + step)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=0.02, atol=0.02)
