"""Signals that ask a run to stop: Ctrl-C of a person, SIGTERM or SIGUSR1 of a scheduler that wants the machine back.

While training they only leave a note, so that the step under way ends and is saved. Elsewhere they raise.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was written."""


class Preempted(KeyboardInterrupt):
    """A scheduler asked the process to end. `saved`: nothing is lost, the run goes on from its checkpoint."""

    def __init__(self, message: str = "", saved: bool = False) -> None:
        super().__init__(message)
        self.saved = saved


def stop_number(stop: KeyboardInterrupt) -> int:
    """The signal that asks for that stop."""
    return int(signal.SIGTERM if isinstance(stop, Preempted) else signal.SIGINT)


def stop_of(number: int) -> KeyboardInterrupt:
    """What that signal raises where nothing is saved for it."""
    return KeyboardInterrupt() if number == signal.SIGINT else Preempted()


@contextlib.contextmanager
def _handled(handle: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Inside, `handle` receives those signals; outside the main thread, where none arrive, nothing changes."""
    previous = {}
    try:
        try:
            for number in numbers:
                previous[number] = signal.getsignal(number)  # before `handle` is there: from then on it may be called, and raise
                signal.signal(number, handle)
        except ValueError:  # not the main thread
            previous.clear()
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def preemption_raises() -> Iterator[None]:
    """Inside, a scheduler's signal raises Preempted, as Ctrl-C raises KeyboardInterrupt."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Preempted

    with _handled(handle, *PREEMPTION):
        yield


@contextlib.contextmanager
def deferred_stop(alone: bool = True) -> Iterator[list[int]]:
    """Inside, a signal only appends its number to the list; who trains looks there after each step.

    A second Ctrl-C raises KeyboardInterrupt at once, but only in a process that is `alone`: torchrun passes on the Ctrl-C that
    its workers have already received from the terminal.
    """
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if alone and number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    with _handled(handle, signal.SIGINT, *PREEMPTION):
        yield asked
