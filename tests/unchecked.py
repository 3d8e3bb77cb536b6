"""What a run of the tests has not checked of the kernels for GPUs: without a device, nvcc or Triton tests of them are skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

_FOLDERS = ("tests/gpu/", "tests/ops/cuda/", "tests/ops/triton_kernels/")


def lines(skipped: Iterable[pytest.TestReport | pytest.CollectReport]) -> list[str]:
    """How many tests of GPU kernels were skipped, a line for each reason; of files that are skipped whole, how many files."""
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for report in skipped:
        if report.nodeid.startswith(_FOLDERS):
            *_, reason = report.longrepr
            (files if isinstance(report, pytest.CollectReport) else tests)[reason.removeprefix("Skipped: ")] += 1
    counted = [(f"{n} test{'s' * (n > 1)}", reason) for reason, n in tests.items()]
    counted += [(f"all tests of {n} file{'s' * (n > 1)}", reason) for reason, n in files.items()]
    return [f"GPU kernels not checked here: {what} skipped: {reason}" for what, reason in counted]
