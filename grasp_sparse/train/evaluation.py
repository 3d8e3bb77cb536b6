"""Loss and accuracy on the test images, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data.sets import Data
from grasp_sparse.train.distributed import current_ranks, sum_over_ranks
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.sharding import evaluation_batches
from grasp_sparse.train.step import autocast, step_options


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, config: TrainConfig, stop: Callable[[], bool] = lambda: False
) -> tuple[float, float] | None:
    """Mean cross-entropy and accuracy (share right) of `model` on the test images; every rank looks at its part of them.

    None, on every rank, if one had to `stop` on the way. Raises UserError, on every rank, where no test image is readable.
    """
    model.eval()
    device = torch.device(config.device)
    dtype = step_options(config).dtype
    loss = correct = images = 0.0
    for x, y in evaluation_batches(config, data, current_ranks()):
        if stop():
            break
        x, y = data.prepare(x, device, config.memory_format), y.to(device)
        with autocast(device, dtype):
            logits = model(x)
        loss += nn.functional.cross_entropy(logits.float(), y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
        images += len(y)
    model.train()
    loss, correct, images, stopped = sum_over_ranks(loss, correct, images, stop())
    if stopped:
        return None
    if not images:
        raise UserError(
            f"Expected at least one readable test image, got none of {len(data.test)}; mend some, then start with --resume auto"
        )
    return loss / images, correct / images
