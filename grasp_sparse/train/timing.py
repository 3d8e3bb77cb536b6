"""Seconds a training step, dense and sparse, measured in turns in one process so that both meet the same machine.

Shared machines drift: only steps taken side by side can be compared. The dense model runs in both memory formats torch
offers, on its own copy, and the faster one is what the sparse step is compared with.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grasp_sparse.timing import Timing, interleaved
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data.normalization import in_layout
from grasp_sparse.train.data_parallel import compiled
from grasp_sparse.train.optimizer import make_optimizer
from grasp_sparse.train.phases import PhaseClock, median_phases
from grasp_sparse.train.step import loss_function, memory_format, step_options, training_step

SPARSE = "sparse"
DENSE_FORMATS = ("nchw", "channels_last")
_MOST_PHASE_ROUNDS = 7


def step_arm(
    config: TrainConfig, model: nn.Module, batches: list[tuple[Tensor, Tensor]], layout: str, clock: PhaseClock | None = None
) -> Callable[[], object]:
    """A call of the result = one training step of `model` on the next batch, already in the arm's layout; `clock` watches it."""
    model = model.train().to(memory_format=memory_format(layout))
    batches = [(in_layout(x, layout) if x.dim() == 4 else x, y) for x, y in batches]
    optimizer, loss_fn, turn = make_optimizer(config, model), loss_function(config), itertools.cycle(batches)
    options, called = step_options(config), compiled(config, model)
    if clock is not None:
        loss_fn = clock.watch(called, optimizer, loss_fn)

    def run() -> None:
        training_step(called, optimizer, loss_fn, *next(turn), options)

    return run if clock is None else clock.timed(run)


def measure_steps(
    config: TrainConfig, dense: nn.Module, sparse: nn.Module | None, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Timing]:
    """Step times of `dense` in each memory format ("dense nchw", …) and of `sparse` ("sparse") as it was trained.

    Works on copies: neither model changes. `batches` are real ones, on the models' device.
    """
    arms = {f"dense {layout}": step_arm(config, copy.deepcopy(dense), batches, layout) for layout in DENSE_FORMATS}
    if sparse is not None:
        arms[SPARSE] = step_arm(config, copy.deepcopy(sparse), batches, config.memory_format)
    return interleaved(arms, config.timing_rounds, synchronize=_synchronize(batches))


def measure_phases(
    config: TrainConfig, dense: nn.Module, sparse: nn.Module | None, batches: list[tuple[Tensor, Tensor]], dense_arm: str
) -> dict[str, dict[str, float]]:
    """Median seconds of each phase of a step (:data:`grasp_sparse.train.phases.PHASES`): of `dense` as in the arm `dense_arm`,
    and of `sparse`. Works on copies, in turns; steps apart from those of `measure_steps`, whose clock is read at their ends alone.
    """
    models = {dense_arm: (dense, dense_arm.removeprefix("dense "))}
    if sparse is not None:
        models[SPARSE] = sparse, config.memory_format
    synchronize = _synchronize(batches)
    clocks = {name: PhaseClock(synchronize) for name in models}
    arms = {name: step_arm(config, copy.deepcopy(model), batches, layout, clocks[name]) for name, (model, layout) in models.items()}
    rounds = min(config.timing_rounds, _MOST_PHASE_ROUNDS)
    interleaved(arms, rounds, warmup=1)
    return {name: median_phases(clock.steps[-rounds:]) for name, clock in clocks.items()}


def _synchronize(batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    return torch.cuda.synchronize if batches[0][0].is_cuda else lambda: None


def best_dense(times: dict[str, Timing]) -> str:
    """Name of the faster dense arm."""
    return min((name for name in times if name != SPARSE), key=lambda name: times[name].median)
