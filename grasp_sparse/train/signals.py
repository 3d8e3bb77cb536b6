"""Ctrl-C that waits for the end of the step under way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the checkpoint was written."""


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C only appends to the list (the step under way ends first); the second one raises."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: no signals reach us here
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
