"""What a step of a trained model costs beside one of the same model with nothing pruned: its time, if asked for, and its memory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grasp_sparse.environment import describe_environment
from grasp_sparse.train.data_parallel import without_peers
from grasp_sparse.train.distributed import Ranks
from grasp_sparse.train.engine import Trainer
from grasp_sparse.train.errors import one_line
from grasp_sparse.train.footprint import measure_footprint
from grasp_sparse.train.logging import say
from grasp_sparse.train.prepare import example_batch, fresh_model
from grasp_sparse.train.resume import resume_command
from grasp_sparse.train.sharding import train_batches
from grasp_sparse.train.timing import best_dense, measure_phases, measure_steps

_TIMED_BATCHES = 4


def beside_dense(trainer: Trainer) -> dict[str, Any]:
    """The sections `timing` and `memory` of a result, from one rank, while the others wait.

    None for what is not asked for, or fails: a trained network is not lost over it.
    """
    timed = trainer.config.timing_rounds > 0
    return {
        "timing": _if_possible(trainer, "dense steps", _times_beside_dense) if timed else None,
        "memory": _if_possible(trainer, "dense memory", _memory_beside_dense),
    }


def _if_possible(trainer: Trainer, what: str, measure: Callable[[Trainer], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return measure(trainer)
    except Exception as error:  # no memory for the dense network, a compiler that fails: whatever it is, training is finished
        warnings.warn(
            f"cannot compare with {what} ({type(error).__name__}: {one_line(error)}); the result is written without, "
            f"to try again: {resume_command(trainer.config, trainer.run_dir)}", stacklevel=2,
        )  # fmt: skip
        return None


def _models_to_compare(trainer: Trainer) -> tuple[nn.Module, nn.Module | None]:
    """The model with nothing pruned and, of a run that pruned, the trained one."""
    config = trainer.config
    return fresh_model(config, trainer.data), None if config.dense else without_peers(trainer.model)


def _times_beside_dense(trainer: Trainer) -> dict[str, Any]:
    config, data = trainer.config, trainer.data
    say(f"timing {config.timing_rounds} steps of each kind, in turns")
    order = train_batches(config, data, 0, 0, Ranks())
    batches = [(data.prepare(x, config.device), y.to(config.device)) for (x, y), _ in zip(order, range(_TIMED_BATCHES))]
    dense, sparse = _models_to_compare(trainer)
    times = measure_steps(config, dense, sparse, batches)
    fastest = best_dense(times)
    return {
        "arms": {name: dataclasses.asdict(arm) for name, arm in times.items()}, "best_dense": fastest,
        "phases": measure_phases(config, dense, sparse, batches, fastest), "environment": describe_environment(),
    }  # fmt: skip


def _memory_beside_dense(trainer: Trainer) -> dict[str, Any]:
    """Bytes by kind; they do not depend on the images, nor on how many there are."""
    config = dataclasses.replace(trainer.config, accumulate=1)
    images = example_batch(config, trainer.data)
    batch = images, torch.zeros(len(images), dtype=torch.int64, device=images.device)
    dense, sparse = _models_to_compare(trainer)
    models = {"dense": dense} if sparse is None else {"dense": dense, "sparse": sparse}
    return {name: dataclasses.asdict(measure_footprint(config, model, batch)) for name, model in models.items()}
