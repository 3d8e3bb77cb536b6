"""The stop-watch: fair turns, true medians, unmeasured calls where they were asked for."""

from __future__ import annotations

import time

import pytest

from grasp_sparse.timing import interleaved


def test_arms_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=4, warmup=2)
    assert "".join(calls) == "ab" * 6
    assert times["a"].count == 4


def test_median_and_quartiles_are_of_the_time_taken() -> None:
    naps = iter([0.2, 0.01, 0.02, 0.03, 0.04, 0.05])
    times = interleaved({"nap": lambda: time.sleep(next(naps))}, rounds=5, warmup=1)["nap"]
    assert (times.q1, times.median, times.q3) == pytest.approx((0.02, 0.03, 0.04), abs=0.008)


def test_lead_in_calls_are_made_and_not_measured() -> None:
    naps = iter([0.0, 0.0, 0.05, 0.01, 0.05, 0.01])
    calls = []
    times = interleaved({"nap": lambda: (time.sleep(next(naps)), calls.append(1))}, rounds=2, warmup=1, lead_in=1)["nap"]
    assert len(calls) == 6
    assert times.median == pytest.approx(0.01, abs=0.008)
