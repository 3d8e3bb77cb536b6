"""One training step and what it needs; the trainer and the stop-watch run exactly the same one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError


def loss_function(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


def memory_format(name: str) -> torch.memory_format:
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, update. Returns the loss (scalar) and the logits [N, classes], both detached.

    Raises UserError for a model that returns something else than logits in training (auxiliary outputs).
    """
    optimizer.zero_grad(set_to_none=True)
    logits = model(x)
    if not torch.is_tensor(logits):
        raise UserError(
            f"Expected the model to return logits in training, got {type(logits).__name__}; try --model-arg aux_logits=false"
        )
    loss = loss_fn(logits, y)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()
