"""Every instruction set this machine can run gives the reference's results, the same with one thread and with two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grasp_sparse import _extension

SWEEP = Path(__file__).with_name("isa_sweep.py")
# glibc fills what malloc returns with 0x7f: scratch memory that a kernel reads before it writes shows as 3e38.
ENVIRONMENT = {**os.environ, "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_equals_reference(isa):
    if isa not in _extension.status().runnable_isas:
        pytest.skip(f"{isa} kernels cannot run here")
    done = subprocess.run(
        [sys.executable, str(SWEEP)], env={**ENVIRONMENT, "GRASP_SPARSE_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [isa]


@pytest.mark.skipif(not _extension.status().loaded, reason="compiled kernels are not loaded")
def test_unknown_instruction_set_is_refused_by_name():
    """At import a warning; a kernel raises, rather than run another instruction set than was asked for."""
    program = """
import torch, grasp_sparse
from grasp_sparse.formats import csr_from_mask
from grasp_sparse.ops import csr_linear
try:
    csr_linear(torch.ones(2, 3), torch.ones(1, 3), csr_from_mask(torch.eye(3, dtype=torch.bool)))
except RuntimeError as error:
    print("raised", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**ENVIRONMENT, "GRASP_SPARSE_ISA": "mmx"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("raised"), done.stderr
    for text in (done.stdout, done.stderr):
        assert "GRASP_SPARSE_ISA: Expected one of" in text and "'mmx'" in text


def test_without_the_extension_one_warning_says_why_and_what_to_do():
    done = subprocess.run(
        [sys.executable, "-c", "import grasp_sparse; print(grasp_sparse._extension.status().isa)"],
        env={**ENVIRONMENT, "GRASP_SPARSE_NO_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference"]
    assert done.stderr.count("Warning") == 1 and "unset it" in done.stderr
