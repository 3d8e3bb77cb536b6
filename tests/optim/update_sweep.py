"""Run as a program by test_update_ops.py: compares the compiled updates with the reference in every layout, and one thread with
two, bit for bit. Prints the instruction set that ran; the first difference ends it with an error."""

from __future__ import annotations

from itertools import product

import torch
from update_cases import LAYOUTS, OPERATIONS, SHAPES, arguments, copied, written

from grasp_sparse import _extension
from grasp_sparse.ops import reference_update

TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-5), torch.float64: dict(rtol=1e-12, atol=1e-12)}
VARIANTS = {
    "sgd_update_": [
        dict(),
        dict(first_step=True),
        dict(weight_decay=0.0, dampening=0.0, nesterov=True),
        dict(maximize=True, dampening=0.0, nesterov=True, first_step=True),
    ],
    "adamw_update_": [dict(), dict(weight_decay=0.0, maximize=True)],
}


def check(name: str, case: str, make) -> None:
    one, two, expected = make(), make(), make()
    getattr(reference_update, name)(*expected)
    getattr(torch.ops.grasp_sparse, name)(*one)
    torch.set_num_threads(2)
    getattr(torch.ops.grasp_sparse, name)(*two)
    torch.set_num_threads(1)
    for a, b, e in zip(written(name, one), written(name, two), written(name, expected), strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"{name}, {case}: two threads give other bits than one.")
        torch.testing.assert_close(a, e, **TOLERANCE.get(a.dtype), msg=lambda text: f"{name}, {case}: {text}")
        if not torch.equal(a == 0, e == 0):
            raise AssertionError(f"{name}, {case}: other zeros than the reference.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, dtype, layout, masked in product(OPERATIONS, TOLERANCE, LAYOUTS, (True, False)):
        for variant in VARIANTS[name]:
            made = arguments(name, dtype, layout, masked, **variant)
            check(name, f"{dtype} {layout} masked={masked} {variant}", lambda made=made: copied(made))
    for dtype in TOLERANCE:
        without = arguments("sgd_update_", dtype)
        without[2] = []
        check("sgd_update_", f"{dtype} without momentum", lambda without=without: copied(without))
        large = arguments("adamw_update_", dtype, shapes=[*SHAPES, (300_001,), (5,)])
        check("adamw_update_", f"{dtype} large", lambda large=large: copied(large))
    print(_extension.status().isa)
