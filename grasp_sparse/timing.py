"""Timing that can be trusted on a shared machine: everything that is compared runs in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Median, quartiles and least of `count` measured calls, in seconds."""

    median: float
    q1: float
    q3: float
    count: int
    best: float

    @classmethod
    def of(cls, taken: Sequence[float]) -> Timing:
        """Of at least two calls that took these seconds."""
        q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
        return cls(median, q1, q3, len(taken), min(taken))


def interleaved(
    arms: dict[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 3,
    lead_in: int = 0,
    synchronize: Callable[[], None] = lambda: None,
    enough: Callable[[dict[str, list[float]]], bool] = lambda seconds: False,
) -> dict[str, Timing]:
    """Run the arms in turns (A B C A B C …) and time each call. Expects rounds >= 2.

    Machines drift: only calls taken side by side can be compared.

    Args:
        warmup: unmeasured rounds at the beginning.
        lead_in: unmeasured calls of an arm before each measured one, so that it is not charged for the caches the arm
            before it has filled with its own data.
        synchronize: called before the clock is read, for devices that work on after a call returns.
        enough: given the seconds taken so far by arm, says after a round, from the third on, that no more are needed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(warmup + rounds):
        for name, run in arms.items():
            for _ in range(lead_in):
                run()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
        if round_number - warmup >= 2 and enough(seconds):
            break
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def interleaved_within(
    arms: dict[str, Callable[[], object]],
    seconds: float,
    *,
    fewest: int = 5,
    most: int = 25,
    lead_in: int = 0,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """``interleaved`` with as many rounds as fit into about `seconds`, at least `fewest` and at most `most`, of short calls as many
    as fit into a tenth of the time: of what takes a fraction of a millisecond, medians of a few calls differ by some percent.

    Two unmeasured calls of each arm warm it up and tell how long a turn takes. Where `fewest` rounds with several lead-in
    calls do not fit, one has to do: what takes that long does not stay in a cache anyway.
    """
    for run in arms.values():
        run()
    synchronize()
    start = time.perf_counter()
    for run in arms.values():
        run()
    synchronize()
    turn = max(time.perf_counter() - start, 1e-6)
    if (lead_in + 1) * turn * (fewest + 1) > seconds:
        lead_in = min(lead_in, 1)
    fitting = int(seconds / (turn * (lead_in + 1))) - 1  # one goes to warming up
    rounds = min(max(fitting, fewest), max(most, fitting // 10))
    return interleaved(arms, rounds, warmup=1, lead_in=lead_in, synchronize=synchronize)
