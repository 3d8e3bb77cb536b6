"""The optimizer of a run, and taking up its state again from a checkpoint that anybody may have written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.train.checkpoint import require
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.position import is_number


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD over all parameters of `model`, dense or sparse. Fused: one pass over each tensor, for both alike."""
    return torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=True,
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Momentum and the last learning rate; the other settings stay the config's. Raises UserError when it does not fit."""
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
        require(is_number(group["lr"]), "the optimizer's lr", "a number", group["lr"])
    _check_momentum(optimizer)


def _check_momentum(optimizer: torch.optim.Optimizer) -> None:
    """UserError unless every momentum fits its parameter: the fused kernel walks both without looking at shapes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = len(optimizer.state.keys() - set(parameters))
    require(not foreign, "the optimizer's state", "of the model's parameters", f"{foreign} entries of others")
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        what = f"the optimizer's state of parameter {number}"
        require(isinstance(state, dict) and state.keys() <= {"momentum_buffer"}, what, "a momentum_buffer", state)
        value = state.get("momentum_buffer")
        expected = f"a dense tensor of shape {list(parameter.shape)}"
        require(value is None or _fits(value, parameter), f"momentum_buffer in {what}", expected, value)


def _fits(value: object, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    # empty_like keeps the strides of a tensor only when it has neither gaps nor overlaps
    dense = torch.empty_like(value).stride() == value.stride()
    return dense and (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
