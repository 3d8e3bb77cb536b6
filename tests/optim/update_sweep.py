"""Run as a program by test_update_ops.py: compares the compiled updates with the reference in every layout, and one thread with
two, bit for bit. Prints the instruction set that ran; the first difference ends it with an error."""

from __future__ import annotations

from itertools import product

import torch
from update_cases import LAYOUTS, OPERATIONS, SHAPES, TOLERANCE, arguments, check

from grasp_sparse import _extension

VARIANTS = {
    "sgd_update_": [
        dict(),
        dict(first_step=True),
        dict(weight_decay=0.0, dampening=0.0, nesterov=True),
        dict(maximize=True, dampening=0.0, nesterov=True, first_step=True),
    ],
    "adamw_update_": [dict(), dict(weight_decay=0.0, maximize=True)],
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, dtype, layout, masked in product(OPERATIONS, TOLERANCE, LAYOUTS, (True, False)):
        for variant in VARIANTS[name]:
            made = arguments(name, dtype, layout, masked, **variant)
            check(name, made, f"{dtype} {layout} masked={masked} {variant}")
    for dtype in TOLERANCE:
        without = arguments("sgd_update_", dtype)
        without[2] = []
        check("sgd_update_", without, f"{dtype} without momentum")
        large = arguments("adamw_update_", dtype, shapes=[*SHAPES, (300_001,), (5,)])
        check("adamw_update_", large, f"{dtype} large")
    print(_extension.status().isa)
