"""How far a run is and when it will end: a bar on a terminal, elsewhere a line every so often, so that a log can be followed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from grasp_sparse.train.logging import human_duration, say


class Progress:
    """Progress through one epoch; a context manager. Not `shown` (ranks but the first), it does nothing.

    Args:
        epoch: number of this epoch, from 1.
        epochs, steps_per_epoch: of the whole run.
        step: steps of this epoch that are done already.
        test_seconds: what the test after an epoch takes, as far as is known.
        seconds_left: until --max-seconds ends training, None without it.
        every: seconds between two lines where there is no terminal; 0: no lines.
        stream: where the bar goes when it is a terminal.
    """

    def __init__(
        self, *, epoch: int, epochs: int, step: int, steps_per_epoch: int, every: float, test_seconds: float = 0.0,
        seconds_left: float | None = None, shown: bool = True, stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.epoch, self.epochs, self.step, self.steps_per_epoch = epoch, epochs, step, steps_per_epoch
        self.every, self.test_seconds, self.seconds_left, self.clock = every, test_seconds, seconds_left, clock
        stream = sys.stderr if stream is None else stream
        self.shown, self.bar = shown, None
        if shown and stream.isatty():
            self.bar = tqdm(total=steps_per_epoch, initial=step, desc=f"epoch {epoch}/{epochs}", unit="step", leave=False, file=stream,
                            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}", dynamic_ncols=True)
        self.started = self.said = clock()
        self.steps = self.images = 0  # since then

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, images: int, loss: float) -> None:
        """A step over so many images is done; `loss` is shown beside the rest."""
        self.step, self.steps, self.images = self.step + 1, self.steps + 1, self.images + images
        if self.bar is not None:
            # tqdm takes the postfix into account only when it redraws, some times a second at most
            self.bar.set_postfix_str(self.state(loss), refresh=False)
            self.bar.update()
        elif self.shown and self.every and self.clock() - self.said >= self.every:
            self.said = self.clock()
            say(f"epoch {self.epoch:>3}/{self.epochs}  step {self.step:,}/{self.steps_per_epoch:,}  {self.state(loss, '  ')}")

    def state(self, loss: float, between: str = ", ") -> str:
        parts = (f"loss {loss:.4f}", f"{self.images_per_second():,.0f} images/s", f"ETA {human_duration(self.seconds_to_go())}")
        return between.join(parts)

    def images_per_second(self) -> float:
        return self.images / max(self.clock() - self.started, 1e-9)

    def seconds_to_go(self) -> float:
        """Until the end of the run, tests included, at the pace of this epoch's steps; expects one step at least."""
        elapsed = self.clock() - self.started
        epochs_to_begin = self.epochs - self.epoch
        steps = self.steps_per_epoch - self.step + epochs_to_begin * self.steps_per_epoch
        seconds = steps * elapsed / self.steps
        if self.seconds_left is not None:
            seconds = min(seconds, max(self.seconds_left - elapsed, 0.0))
        # an end by the clock comes within some epoch: of the tests then only the last one is certain
        tests = 1 if self.seconds_left is not None else epochs_to_begin + 1
        return seconds + tests * self.test_seconds
