"""The poison works: without it the tests of unwritten output would prove nothing. Shares of the tests are all of them, once."""

import subprocess
import sys
from pathlib import Path

import torch

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
    every, shares = _collected(), [_collected("--share", f"{i}/3") for i in (1, 2, 3)]
    assert sorted(test for share in shares for test in share) == sorted(every)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares[0] == [test for test in every if test in set(shares[0])] == _collected("--share", "1/3")
    assert "Expected I/N with I from 1 to N, got 4/3" in _collected("--share", "4/3")[0]
