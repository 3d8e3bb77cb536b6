"""Seconds a training step, dense and sparse, measured in turns in one process so that both meet the same machine.

Shared machines drift: only steps taken side by side can be compared. The dense model runs in both memory formats torch
offers, on its own copy, and the faster one is what the sparse step is compared with.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.step import loss_function, make_optimizer, memory_format, training_step

SPARSE = "sparse"
DENSE_FORMATS = ("nchw", "channels_last")


@dataclass(frozen=True)
class StepTime:
    """Median and quartiles of `count` measured steps, in seconds."""

    median: float
    q1: float
    q3: float
    count: int


def interleaved(
    arms: dict[str, Callable[[], object]], rounds: int, warmup: int = 3, synchronize: Callable[[], None] = lambda: None
) -> dict[str, StepTime]:
    """Run the arms in turns (A B C A B C …), `warmup` unmeasured rounds first. Expects rounds >= 2."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(warmup + rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            synchronize()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    times = {}
    for name, taken in seconds.items():
        q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
        times[name] = StepTime(median, q1, q3, rounds)
    return times


def _step_arm(
    config: TrainConfig, model: nn.Module, batches: list[tuple[Tensor, Tensor]], layout: str
) -> Callable[[], object]:
    """A call of the result = one training step of `model` on the next batch, already in the arm's layout."""
    model = model.train().to(memory_format=memory_format(layout))
    batches = [(x.to(memory_format=memory_format(layout)), y) for x, y in batches]
    optimizer, loss_fn, turn = make_optimizer(config, model), loss_function(config), itertools.cycle(batches)

    def run() -> None:
        training_step(model, optimizer, loss_fn, *next(turn))

    return run


def measure_steps(
    config: TrainConfig, dense: nn.Module, sparse: nn.Module | None, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, StepTime]:
    """Step times of `dense` in each memory format ("dense nchw", …) and of `sparse` ("sparse") as it was trained.

    Works on copies: neither model changes. `batches` are real ones, on the models' device.
    """
    arms = {f"dense {layout}": _step_arm(config, copy.deepcopy(dense), batches, layout) for layout in DENSE_FORMATS}
    if sparse is not None:
        arms[SPARSE] = _step_arm(config, copy.deepcopy(sparse), batches, config.memory_format)
    synchronize = torch.cuda.synchronize if batches[0][0].is_cuda else lambda: None
    return interleaved(arms, config.timing_rounds, synchronize=synchronize)


def best_dense(times: dict[str, StepTime]) -> str:
    """Name of the faster dense arm."""
    return min((name for name in times if name != SPARSE), key=lambda name: times[name].median)
