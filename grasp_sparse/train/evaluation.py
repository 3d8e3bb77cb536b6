"""Loss and accuracy on the test images."""

from __future__ import annotations

import torch
from torch import nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import Data
from grasp_sparse.train.step import memory_format


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, config: TrainConfig) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (share right) of `model` on the test images."""
    model.eval()
    loss = correct = 0.0
    for x, y in data.test.in_order(2 * config.batch_size):
        x, y = x.to(config.device, memory_format=memory_format(config.memory_format)), y.to(config.device)
        logits = model(x)
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    model.train()
    return loss / len(data.test), correct / len(data.test)
