"""Whole steps are measured with denormal numbers taken for zero, by every thread, and rows say so."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from grasp_sparse.bench.denormals import flush_denormals
said = flush_denormals() if {flush} else "kept"
torch.set_num_threads(2)
left = torch.full((1 << 20,), 1e-40).mul(1.0).count_nonzero()
print(said, int(left))
"""


@pytest.mark.parametrize("flush, expected", [(True, "zero 0"), (False, f"kept {1 << 20}")])
def test_every_thread_takes_them_for_zero(flush, expected):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(flush=flush)], capture_output=True, text=True)
    assert done.stdout.split() == expected.split(), done.stderr
