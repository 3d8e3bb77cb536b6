"""The Triton kernels equal the float64 reference, on the CPU under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import grasp_sparse

pytest.importorskip("triton")
TESTS, PACKAGE = Path(__file__).parents[1], Path(grasp_sparse.__file__).parents[1]


@pytest.mark.parametrize("sweep", ["linear", "conv2d", "tiles", "edges", "lists"])
def test_equals_reference(sweep):
    paths = os.pathsep.join((str(TESTS), str(PACKAGE)))
    program = [sys.executable, str(Path(__file__).with_name("interpreted.py")), sweep]
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.stderr.endswith("no loops in this interpreter\n"):
        pytest.skip("this Triton's interpreter has no loops with this numpy; install numpy<2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["interpreted", sweep]
