"""The optimizer steps on CUDA, run by the emulator, equal the reference: every layout, masks, more tensors than one launch takes."""

from __future__ import annotations

import ctypes

import pytest
import torch
from update_cases import LAYOUTS, OPERATIONS, SHAPES, arguments, copied, written

from grasp_sparse.ops import reference_update

TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-6), torch.float64: dict(rtol=1e-12, atol=1e-13)}
CHANGES = {
    "sgd_update_": [{}, dict(nesterov=True, dampening=0.0), dict(first_step=True), dict(maximize=True), dict(weight_decay=0.0)],
    "adamw_update_": [{}, dict(maximize=True), dict(weight_decay=0.0), dict(eps=1e-3)],
}
CASES = [(name, change) for name in OPERATIONS for change in CHANGES[name]]


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, change", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(emulated, dtype, name, change, layout, masked):
    shapes = [*SHAPES, (3, 1500)]  # the last in two blocks
    made = arguments(name, dtype, layout, masked, shapes, **change)
    exact = copied(made)
    getattr(emulated, name)(*made)
    getattr(reference_update, name)(*exact)
    for got, want in zip(written(name, made), written(name, exact), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPERATIONS)
def test_more_tensors_than_one_launch_takes(emulated, name):
    made = arguments(name, torch.float32, shapes=[(n % 7 + 1, n % 5 + 1) for n in range(93)])
    exact = copied(made)
    getattr(emulated, name)(*made)
    getattr(reference_update, name)(*exact)
    for got, want in zip(written(name, made), written(name, exact), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("tensors, launches", [(1, 1), (40, 1), (41, 2), (93, 3)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_launch_updates_forty_tensors(emulated, emulator, name, tensors, launches):
    emulator.count_launches.restype = ctypes.c_int64
    made = arguments(name, torch.float32, shapes=[(n % 7 + 1,) for n in range(tensors)])
    before = emulator.count_launches()
    getattr(emulated, name)(*made)
    # AdamW's steps are counted in one of their own.
    assert emulator.count_launches() - before == launches * (2 if name == "adamw_update_" else 1)


def test_without_momentum(emulated):
    made = arguments("sgd_update_", torch.float32)
    made[2] = []
    exact = copied(made)
    emulated.sgd_update_(*made)
    reference_update.sgd_update_(*exact)
    for got, want in zip(made[0], exact[0], strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", OPERATIONS)
def test_wrong_arguments_change_nothing(emulated, name):
    made = arguments(name, torch.float32, shapes=[(17,), (20,)])
    made[2] = [made[2][0], made[2][1][:3]]
    before = copied(made)
    with pytest.raises(RuntimeError, match="Expected states"):
        getattr(emulated, name)(*made)
    assert all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, before), strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_step_that_is_left_out_changes_nothing(emulated, name):
    made = arguments(name, torch.float32, shapes=[*SHAPES, (3, 1500)])
    before, exact = copied(made), copied(made)
    getattr(emulated, name)(*made, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, before), strict=True))
    getattr(emulated, name)(*made, torch.tensor(0.0))
    getattr(reference_update, name)(*exact)
    for got, want in zip(written(name, made), written(name, exact), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])
