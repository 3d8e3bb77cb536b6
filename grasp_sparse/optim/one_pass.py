"""Which optimizer takes one pass over each tensor of a model, be it dense, sparse or masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grasp_sparse.optim.adamw import AdamW
from grasp_sparse.optim.masks import layer_masks
from grasp_sparse.optim.sgd import SGD

_OURS = {"SGD": SGD, "AdamW": AdamW}


def one_pass(name: str, model: nn.Module, *, raw_gradients: bool = True, **settings: Any) -> torch.optim.Optimizer:
    """The optimizer over the parameters of ``model``: torch's fused one; where layers are masked the one here, which masks in its pass.

    A parameter of complex numbers, which no fused one takes, makes it torch's usual one.

    Args:
        name: "SGD" or "AdamW".
        raw_gradients: masked layers leave masking to it; not if somebody looks at gradients before it does.
        settings: of the optimizer.
    """
    fused = all(parameter.is_floating_point() for parameter in model.parameters())
    masks = layer_masks(model)
    if masks and fused:
        return _OURS[name](model.parameters(), masks=masks, raw_gradients=raw_gradients, **settings)
    return getattr(torch.optim, name)(model.parameters(), fused=fused, **settings)
