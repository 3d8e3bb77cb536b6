"""The stop-watch: fair turns, true medians, unmeasured calls where they were asked for."""

from __future__ import annotations

import pytest

from grasp_sparse import timing
from grasp_sparse.timing import interleaved, interleaved_within


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it: clock.now += seconds."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def napping(clock, naps):
    naps = iter(naps)

    def run() -> None:
        clock.now += next(naps)

    return run


def test_arms_take_turns_and_warm_up_is_not_counted():
    calls: list[str] = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=4, warmup=2)
    assert "".join(calls) == "ab" * 6
    assert times["a"].count == 4


def test_median_and_quartiles_are_of_the_time_taken(clock):
    times = interleaved({"nap": napping(clock, [20, 1, 2, 3, 4, 5])}, rounds=5, warmup=1)["nap"]
    assert (times.q1, times.median, times.q3) == (2, 3, 4)


def test_lead_in_calls_are_made_and_not_measured(clock):
    times = interleaved({"nap": napping(clock, [9, 9, 50, 1, 50, 2])}, rounds=2, warmup=1, lead_in=1)["nap"]
    assert times.median == 1.5


def test_time_waiting_for_a_device_is_measured(clock):
    def finish() -> None:
        clock.now += 7

    assert interleaved({"a": lambda: None}, rounds=2, warmup=0, synchronize=finish)["a"].median == 7


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 5), (30, 9), (600, 25), (1000, 33)])
def test_rounds_follow_from_the_time_there_is(clock, seconds, rounds):
    calls: list[str] = []

    def run() -> None:
        calls.append("")
        clock.now += 1

    # A turn of both arms with one lead-in call takes 3 s: 30 s are 10 turns, of which one warms up.
    def quick() -> None:
        clock.now += 0.5

    times = interleaved_within({"a": run, "b": quick}, seconds, lead_in=1)
    assert times["a"].count == rounds
    assert len(calls) == 2 + 2 * (rounds + 1)


def test_slow_arms_get_one_lead_in_call(clock):
    calls: list[str] = []

    def run() -> None:
        calls.append("")
        clock.now += 1

    interleaved_within({"a": run}, 10, lead_in=3)
    assert len(calls) == 2 + 2 * 6


def test_rounds_end_when_enough_is_known_but_not_before_the_third(clock):
    seen = []

    def enough(seconds):
        seen.append(list(seconds["nap"]))
        return len(seconds["nap"]) == 4

    times = interleaved({"nap": napping(clock, [9, 4, 3, 2, 1])}, rounds=50, warmup=1, enough=enough)["nap"]
    assert (times.count, times.best) == (4, 1) and seen == [[4, 3, 2], [4, 3, 2, 1]]
