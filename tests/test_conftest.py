"""The poison works: without it the tests of unwritten output would prove nothing. Shares of the tests are all of them, once."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shares import parse, share

HERE = Path(__file__).parent


def test_new_memory_is_poisoned():
    for size in (3, 1000, 1_000_000):
        assert torch.empty(size).isnan().all()
        assert (torch.empty(size, dtype=torch.float64) > 1e300).all()
        assert torch.ops.aten.empty_strided([size], [1]).isnan().all()


def _collected(*flags: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", str(HERE / "gpu" / "test_optimizers_on_a_device.py"), *flags]
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


@pytest.mark.parametrize("text", ["4/3", "0/3", "1", "1/0", "-1/2", "a/b"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"Expected I/N with I from 1 to N, got {text}"):
        parse(text)
