"""Where the time of a training step goes: forward, loss, backward, update.

Read by hooks on the model, the loss function and the optimizer, so that the step which is watched is the step that trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

PHASES = ("forward", "loss", "backward", "update", "other")
Loss = Callable[[Tensor, Tensor], Tensor]


class PhaseClock:
    """Seconds by phase of every watched step, in `steps`; `synchronize` is called before the clock is read.

    "other" is what a step does besides, clearing gradients say. A phase that comes more than once in a step (gradients
    accumulated over several passes) counts with all of its time.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps: list[dict[str, float]] = []
        self._synchronize, self._clock, self._last, self._updates = synchronize, clock, 0.0, 0

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Loss) -> Loss:
        """Hook into `model` and `optimizer`; returns `loss_fn`, watched too."""
        model.register_forward_pre_hook(lambda *_: self._lap("other"))
        model.register_forward_hook(lambda *_: self._lap("forward"))
        optimizer.register_step_pre_hook(lambda *_: self._begin_update())
        optimizer.register_step_post_hook(lambda *_: self._end_update())

        def watched(logits: Tensor, targets: Tensor) -> Tensor:
            self._lap("other")
            loss = loss_fn(logits, targets)
            self._lap("loss")
            return loss

        return watched

    def timed(self, run: Callable[[], object]) -> Callable[[], None]:
        """`run` makes one watched step; the result does the same and adds a row to `steps`."""

        def step() -> None:
            self._synchronize()
            self.steps.append(dict.fromkeys(PHASES, 0.0))
            self._last = self._clock()
            run()
            self._lap("other")

        return step

    def _begin_update(self) -> None:
        # a subclass whose step calls its parent's has the hooks run by both
        self._lap("update" if self._updates else "backward")
        self._updates += 1

    def _end_update(self) -> None:
        self._lap("update")
        self._updates -= 1

    def _lap(self, phase: str) -> None:
        self._synchronize()
        now = self._clock()
        self.steps[-1][phase] += now - self._last
        self._last = now


def median_phases(steps: Sequence[Mapping[str, float]], phases: Iterable[str] = PHASES) -> dict[str, float]:
    """Median seconds of each phase over the steps."""
    return {phase: median(step[phase] for step in steps) for phase in phases}
