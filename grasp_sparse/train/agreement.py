"""What happens after a step, agreed by all ranks, so that they save and stop at the same one."""

from __future__ import annotations

import math
import signal
import time
from typing import NamedTuple


class Agreed(NamedTuple):
    """What all ranks do now."""

    save: bool
    stop: bool
    preempted: bool  # when stopping: by a scheduler, not by a person


class Requests:
    """What signals and the clock ask of this rank. What one rank is asked, all do.

    `asked` receives the numbers of signals; a save is due `save_seconds` after the last one, and of a `fresh` run at once: its masks
    may have taken longer to find than that. `mine()` travels with the sum over all ranks that a step needs anyway, and `agreed()`
    reads the sums.
    """

    def __init__(self, asked: list[int], save_seconds: float, fresh: bool = False) -> None:
        self.asked, self.save_seconds = asked, save_seconds
        self._saved_at = -math.inf if fresh else time.monotonic()

    def saved(self) -> None:
        """A save was made or tried: the next one is due `save_seconds` from now."""
        self._saved_at = time.monotonic()

    def mine(self) -> tuple[bool, bool, bool]:
        """(a save is due, Ctrl-C, a scheduler's signal), to be summed over the ranks."""
        due = time.monotonic() - self._saved_at >= self.save_seconds
        return due, signal.SIGINT in self.asked, any(number != signal.SIGINT for number in self.asked)

    @staticmethod
    def agreed(due: float, interrupted: float, preempted: float) -> Agreed:
        """What follows from the sums of `mine()`: the same on every rank."""
        return Agreed(due > 0, interrupted + preempted > 0, preempted > 0)
