"""The optimizer of a run, and taking up its state again from a checkpoint that anybody may have written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse import optim
from grasp_sparse.train.checkpoint import require
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.position import is_number

_MOMENTS = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq"}}


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters of `model`, dense or sparse, in one pass over each tensor.

    Gradients of masked layers come to it as they are, unless somebody looks at gradients before it does: clipping by norm, or the
    search for what overflowed in float16.
    """
    settings = {
        "lr": config.lr, "weight_decay": config.weight_decay, "raw_gradients": config.clip_norm is None and config.precision != "fp16",
    }  # fmt: skip
    if config.optimizer == "adamw":
        optimizer = optim.one_pass("AdamW", model, betas=(config.momentum, config.beta2), **settings)
    else:
        optimizer = optim.one_pass("SGD", model, momentum=config.momentum, nesterov=config.nesterov, **settings)
    _start_moments(optimizer)
    return optimizer


def _start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Zeros for all moments, from which the first step has the bits that it has from none.

    Left to itself, torch's SGD makes memory that its kernel fills in the first step, and keeps it unfilled when that step is left out
    because gradients overflowed. And a parameter that has its first gradient after a resume would look like one whose moments are lost.
    """
    for group in optimizer.param_groups:
        adamw = "betas" in group
        moments = _MOMENTS["adamw"] if adamw else _MOMENTS["sgd"] if group["momentum"] else ()
        for parameter in group["params"]:
            if moments and parameter.requires_grad:
                optimizer.state[parameter].update((name, torch.zeros_like(parameter)) for name in sorted(moments))
                if adamw:
                    optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def restore_optimizer(config: TrainConfig, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Moments and the last learning rate; the other settings stay the config's. Raises UserError when it does not fit."""
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
        require(is_number(group["lr"]), "the optimizer's lr", "a number", group["lr"])
    _check_moments(optimizer, _MOMENTS[config.optimizer], counts=config.optimizer == "adamw")
    if optimizer.state:
        _expect_complete(optimizer)
    else:
        _start_moments(optimizer)


def _check_moments(optimizer: torch.optim.Optimizer, moments: set[str], counts: bool) -> None:
    """UserError unless all moments fit their parameter: the fused kernel walks them without looking at shapes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = len(optimizer.state.keys() - set(parameters))
    require(not foreign, "the optimizer's state", "of the model's parameters", f"{foreign} entries of others")
    known = moments | {"step"} if counts else moments
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        what = f"the optimizer's state of parameter {number}"
        require(isinstance(state, dict) and state.keys() <= known, what, f"of {', '.join(sorted(known))}", state)
        require(not (counts and state) or state.keys() == known, what, f"all of {', '.join(sorted(known))}", list(state))
        for name in moments & state.keys():
            value, expected = state[name], f"a dense tensor of shape {list(parameter.shape)}"
            require(_fits(value, parameter), f"{name} in {what}", expected, value)
        if "step" in state:
            require(_is_count(state["step"]), f"step in {what}", "a number of updates", state["step"])


def _expect_complete(optimizer: torch.optim.Optimizer) -> None:
    """At the next step UserError unless every parameter that has a gradient has moments: which ones will is known only then."""

    def check(*_: object) -> None:
        hook.remove()
        used = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
        without = sum(not optimizer.state.get(parameter) for parameter in used)
        require(not without, "the optimizer's state", f"there for all {len(used)} parameters", f"none for {without}")

    hook = optimizer.register_step_pre_hook(check)


def _is_count(value: object) -> bool:
    return isinstance(value, Tensor) and value.shape == () and value.is_floating_point() and bool(value >= 0)


def _fits(value: object, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    # empty_like keeps the strides of a tensor only when it has neither gaps nor overlaps
    dense = torch.empty_like(value).stride() == value.stride()
    return dense and (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
