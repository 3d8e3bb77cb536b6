"""The operations under the optimizers: every instruction set equals the reference, and wrong arguments change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from update_cases import LAYOUTS, OPERATIONS, arguments, copied, written

from grasp_sparse import _extension
from grasp_sparse.bits import pack_bits, pack_like, unpack_bits, unpack_like
from grasp_sparse.ops import reference_update

SWEEP = Path(__file__).with_name("update_sweep.py")
ENVIRONMENT = {**os.environ, "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
SMALL = [(5,), (9, 3), (2, 3, 2, 2)]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_equals_reference(isa):
    if isa not in _extension.status().runnable_isas:
        pytest.skip(f"{isa} kernels cannot run here")
    done = subprocess.run(
        [sys.executable, str(SWEEP)], env={**ENVIRONMENT, "GRASP_SPARSE_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [isa]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, layout):
    made = arguments(name, torch.float32, layout, shapes=SMALL)
    torch.library.opcheck(getattr(torch.ops.grasp_sparse, name).default, tuple(made))


@pytest.mark.parametrize("name", OPERATIONS)
def test_pruned_weights_and_states_become_zero_whatever_they_and_the_gradient_hold(name):
    made = arguments(name, torch.float32)
    bits = made[-8] if name == "sgd_update_" else made[-7]
    kept = [unpack_like(b, v) if b.numel() else torch.ones_like(v, dtype=torch.bool) for b, v in zip(bits, made[0], strict=True)]
    assert any(not grad.isfinite().all() for grad in made[1])
    getattr(torch.ops.grasp_sparse, name)(*made)
    for tensors in made[0], made[2], *([] if name == "sgd_update_" else [made[3]]):
        for tensor, keep in zip(tensors, kept, strict=True):
            assert (tensor[~keep] == 0).all() and not tensor[~keep].signbit().any()
            assert (tensor[keep] != 0).all() and tensor[keep].isfinite().all()


def _first(change):
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


WRONG = {
    "fewer": lambda tensors: tensors[:-1],
    "wrong shape": _first(lambda t: t[:-1]),
    "wrong shape, last": lambda tensors: [*tensors[:-1], tensors[-1][:1]],
    "wrong dtype": _first(torch.Tensor.double),
}
PLACES = {
    "sgd_update_": {"grads": 1, "states": 2, "mask_bits": 3},
    "adamw_update_": {"grads": 1, "states": 2, "squares": 3, "mask_bits": 5},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name, place", [(name, place) for name in OPERATIONS for place in PLACES[name]])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
def test_wrong_arguments_are_refused_before_anything_is_written(name, place, change, compiled):
    made = arguments(name, torch.float32, shapes=[(17,), (20,), (8, 3), (4, 9)])
    index = PLACES[name][place]
    if place == "mask_bits":
        made[index] = [pack_like(torch.ones(v.shape, dtype=torch.bool), v) for v in made[0]]
    made[index] = change(made[index])
    before = copied(made)
    with pytest.raises((RuntimeError, ValueError), match="Expected"):
        getattr(torch.ops.grasp_sparse if compiled else reference_update, name)(*made)
    assert all(torch.equal(a, b) for a, b in zip(written(name, made), written(name, before), strict=True))


@pytest.mark.skipif(not _extension.status().loaded, reason="torch refuses it in the reference")
@pytest.mark.parametrize("name", OPERATIONS)
def test_expanded_tensors_and_wrong_steps_are_refused(name):
    made = arguments(name, torch.float32, shapes=SMALL)
    made[0][1] = torch.zeros(9, 1).expand(9, 3)
    with pytest.raises(RuntimeError, match=r"values\[1\].*expanded"):
        getattr(torch.ops.grasp_sparse, name)(*made)
    if name == "adamw_update_":
        made = arguments(name, torch.float32, shapes=SMALL)
        made[4][2] = torch.zeros(2)
        with pytest.raises(RuntimeError, match="steps"):
            torch.ops.grasp_sparse.adamw_update_(*made)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_bits_are_numpys(count):
    mask = torch.rand(count) < 0.5
    assert (pack_bits(mask).numpy() == np.packbits(mask.numpy())).all()
    assert torch.equal(unpack_bits(pack_bits(mask), count), mask)


def test_bits_follow_the_memory_of_the_weight():
    mask = torch.rand(2, 3, 4, 5) < 0.5
    for weight in (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2), torch.zeros(2, 3, 4, 10)[..., ::2]):
        assert torch.equal(unpack_like(pack_like(mask, weight), weight), mask)
    channels_last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(pack_like(mask, channels_last), pack_bits(mask.permute(0, 2, 3, 1).reshape(-1)))
