"""The poison works: without it the tests of unwritten output would prove nothing. Shares of the tests are all of them, once. What
is skipped of GPU kernels is said."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import unchecked
from shares import parse, share

HERE = Path(__file__).parent


def test_new_memory_is_poisoned():
    for size in (3, 1000, 1_000_000):
        assert torch.empty(size).isnan().all()
        assert (torch.empty(size, dtype=torch.float64) > 1e300).all()
        assert torch.ops.aten.empty_strided([size], [1]).isnan().all()


def _collected(*flags: str, files: tuple[str, ...] = ("gpu/test_optimizers_on_a_device.py",)) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", *(str(HERE / file) for file in files), *flags]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "::" in line] or [done.stderr]


def test_shares_are_all_tests_once():
    every = [f"test_{i}" for i in range(50)]
    parts = [share(every, i, 3) for i in (1, 2, 3)]
    assert sorted(test for part in parts for test in part) == sorted(every)
    assert [len(part) for part in parts] == [17, 17, 16] and parts[0] == share(every, 1, 3)


def test_a_share_is_what_runs_in_the_usual_order():
    every, first = _collected(), _collected("--share", "1/3")
    assert first == [test for test in every if test in set(share(every, 1, 3))]


# As on a machine without a device, nvcc and Triton.
BARE = """
import sys
sys.modules["triton"] = None
import torch
torch.version.cuda, torch.cuda.is_available = None, lambda: False
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_end_says_what_of_gpu_kernels_was_not_checked():
    device, compiled = "gpu/test_cuda_timing.py", "ops/cuda/test_compiled_cuda.py"
    command = [sys.executable, "-c", BARE, *(str(HERE / path) for path in (device, compiled, "ops/triton_kernels"))]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    told = [line.split(": ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("GPU kernels not checked here: ")]
    found = {reason: what for what, reason in told}
    every = _collected(files=(device, compiled))
    assert found.pop("needs a CUDA device") == f"{sum(device in test for test in every)} tests skipped"
    assert found.pop("needs nvcc and a torch built with CUDA") == f"{sum(compiled in test for test in every)} tests skipped"
    ((reason, what),) = found.items()
    assert reason.startswith("could not import 'triton'") and what == "all tests of 3 files skipped"


def test_of_other_tests_that_are_skipped_nothing_is_said():
    def skipped(test: str) -> pytest.TestReport:
        return pytest.TestReport(test, (test, 1, test), {}, "skipped", (test, 1, "Skipped: a reason"), "setup")

    assert unchecked.lines([skipped("tests/nn/test_norm.py::test_it")]) == []
    assert unchecked.lines([skipped("tests/nn/test_norm.py::test_it"), skipped("tests/ops/cuda/test_it.py::test_it")]) == [
        "GPU kernels not checked here: 1 test skipped: a reason"
    ]


@pytest.mark.parametrize("text", ["4/3", "0/3", "1", "1/0", "-1/2", "a/b"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"Expected I/N with I from 1 to N, got {text}"):
        parse(text)
