"""`found_inf`: who has seen an overflow says so where the optimizer runs, and the step is left out without asking."""

from __future__ import annotations

import pytest
import torch
from mixed_model import assert_equal_parameters, backward, mixed_model
from update_cases import OPERATIONS, SHAPES, arguments, copied, written

from grasp_sparse import optim
from grasp_sparse.ops import reference_update

OPTIMIZERS = {
    "SGD": (optim.SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)),
    "AdamW": (optim.AdamW, torch.optim.AdamW, dict(lr=1e-2)),
}
OWNERS = {"compiled": torch.ops.grasp_sparse, "reference": reference_update}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_change_nothing_unless_it_is_zero(name, owner):
    made = arguments(name, torch.float32, shapes=SHAPES)
    before, usual = copied(made), copied(made)
    for found in (1.0, -2.0, torch.nan, torch.inf):
        getattr(owner, name)(*made, torch.tensor(found))
        assert all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, before), strict=True))
    getattr(owner, name)(*made, torch.tensor([0.0]))
    getattr(owner, name)(*usual)
    assert all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, usual), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, before), strict=True))


@pytest.mark.parametrize("found_inf", [torch.zeros(2), torch.zeros((), dtype=torch.float64)], ids=["two", "float64"])
@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_another_thing_is_refused_before_anything_is_written(name, owner, found_inf):
    made = arguments(name, torch.float32, shapes=[(17,), (20,)])
    before = copied(made)
    with pytest.raises((RuntimeError, ValueError), match="Expected found_inf of one float32 number"):
        getattr(owner, name)(*made, found_inf)
    assert all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, before), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_leave_out_the_steps_that_torch_leaves_out(name):
    ours, theirs, settings = OPTIMIZERS[name]
    models = mixed_model(), mixed_model()
    optimizers = ours(models[0].parameters(), **settings), theirs(models[1].parameters(), fused=True, **settings)
    for overflow in (False, True, False, True, True, False):
        for model, optimizer in zip(models, optimizers, strict=True):
            before = [p.clone() for p in model.parameters()]
            optimizer.zero_grad()
            backward(model, torch.Generator().manual_seed(0))
            optimizer.found_inf = torch.tensor(float(overflow))
            optimizer.step()
            assert overflow == all(map(torch.equal, before, model.parameters()))
    assert_equal_parameters(*models, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unscaled", [False, True], ids=["whole", "unscaled by hand"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_leaves_it_all_to_the_optimizer_as_it_does_to_torch_s(name, unscaled, monkeypatch):
    ours, theirs, settings = OPTIMIZERS[name]
    models = mixed_model(), mixed_model()
    optimizers = ours(models[0].parameters(), **settings), theirs(models[1].parameters(), fused=True, **settings)
    for model, optimizer in zip(models, optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        monkeypatch.setattr(scaler, "_maybe_opt_step", None)  # where a scaler asks the device
        for step in range(6):
            before = [p.clone() for p in model.parameters()]
            optimizer.zero_grad()
            backward(model, torch.Generator().manual_seed(step), scale=scaler.scale)
            if step == 2:
                next(model.parameters()).grad.fill_(torch.inf)
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert (step == 2) == all(map(torch.equal, before, model.parameters()))
    assert_equal_parameters(*models, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dampening", [0, 0.5])
def test_a_first_step_that_is_left_out_starts_no_momentum(dampening):
    models = mixed_model(), mixed_model()
    for model, steps in zip(models, ((1.0, 0.0, 0.0), (0.0, 0.0)), strict=True):
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=dampening)
        for overflow in steps:
            optimizer.zero_grad()
            backward(model, torch.Generator().manual_seed(0))
            optimizer.found_inf = torch.tensor(overflow)
            optimizer.step()
    assert_equal_parameters(*models)
