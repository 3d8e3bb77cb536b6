"""Bytes that training keeps from step to step, summed over the tensors that are really there."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.optimizer import make_optimizer
from grasp_sparse.train.step import loss_function, step_options, training_step


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind. `indices` are the integer and bool buffers that say which weights are kept: the price of being sparse."""

    parameters: int
    gradients: int
    optimizer: int
    indices: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.indices


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: shared ones count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def measure_footprint(config: TrainConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Footprint:
    """Footprint of training `model`: a copy takes one real step, then its tensors are counted.

    Scalars (step counters, num_batches_tracked) and float buffers (batch-norm statistics) are the same, dense or sparse,
    and not counted.
    """
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer(config, model)
    training_step(model, optimizer, loss_function(config), *batch, step_options(config))
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim() > 0]
    indices = [b for b in model.buffers() if not b.is_floating_point() and b.dim() > 0]
    return Footprint(
        parameters=_bytes(model.parameters()),
        gradients=_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=_bytes(moments),
        indices=_bytes(indices),
    )
