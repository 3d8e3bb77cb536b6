"""A training step of a sparse network, for whoever looks at its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from grasp_sparse.optim import SGD
from grasp_sparse.surgery import sparsify_
from grasp_sparse.train.step import training_step


def sparse_step(model: nn.Module, size: int, density: float) -> Callable[[], object]:
    """To be called again and again, on four channels_last images of side ``size``; every weight matrix of ``model`` runs sparse."""
    model = model.to(memory_format=torch.channels_last)
    masks = {name: torch.rand_like(p) < density for name, p in model.named_parameters() if p.dim() > 1}
    sparsify_(model, masks, plan=dict.fromkeys(masks, "sparse"))
    optimizer, loss = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4), nn.CrossEntropyLoss()
    batch = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last), torch.arange(4)
    return lambda: training_step(model, optimizer, loss, *batch)
