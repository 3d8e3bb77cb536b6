"""One training step and what it needs; the trainer and the stop-watch run exactly the same one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken. `dtype`: of autocast; `accumulate`: micro-batches a step; `clip_norm`: of all gradients together;
    `graphs`: torch.compile replays recorded CUDA graphs."""

    dtype: torch.dtype | None = None
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    accumulate: int = 1
    clip_norm: float | None = None
    graphs: bool = False


def step_options(config: TrainConfig) -> StepOptions:
    """What the recipe asks for. Only float16 needs its loss scaled: bfloat16 has the exponents of float32."""
    scaler = GradScaler(torch.device(config.device).type, enabled=config.precision == "fp16")
    return StepOptions(_AUTOCAST[config.precision], scaler, config.accumulate, config.clip_norm, config.cuda_graphs)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Inside, products on `device` are computed in `dtype`; None changes nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_function(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


def memory_format(name: str) -> torch.memory_format:
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    options: StepOptions = StepOptions(),
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward for each micro-batch of x [N, …] and y [N] on the model's device, then one update.

    Every image counts the same, however the batch is cut, and gradients cross the ranks with the last micro-batch only. Without
    a finite loss there is no update: the weights still are those that gave it. Returns the mean loss (scalar) and the logits
    [N, classes], both detached. `prepare` makes the model's input of a micro-batch of x.

    Raises UserError for a model that returns something else than logits in training (auxiliary outputs).
    """
    if options.graphs:
        torch.compiler.cudagraph_mark_step_begin()  # what they gave in the step before may be overwritten now
    optimizer.zero_grad(set_to_none=True)
    parts = [part for part in zip(x.tensor_split(options.accumulate), y.tensor_split(options.accumulate)) if len(part[1])]
    losses, outputs = [], []
    for number, (images, labels) in enumerate(parts, 1):
        with _synchronized(model, number == len(parts)):
            with autocast(y.device, options.dtype):
                logits = model(prepare(images))
                if not torch.is_tensor(logits):
                    raise UserError(
                        f"Expected the model to return logits in training, got {type(logits).__name__}; "
                        "try --model-arg aux_logits=false"
                    )
                loss = loss_fn(logits, labels)
            if len(parts) > 1:
                loss = loss * (len(labels) / len(y))
            options.scaler.scale(loss).backward()
        losses.append(loss.detach())
        outputs.append(logits.detach())
    if options.clip_norm is not None:
        options.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
    loss, output = (losses[0], outputs[0]) if len(parts) == 1 else (torch.stack(losses).sum(), torch.cat(outputs))
    if options.scaler.is_enabled():
        options.scaler.step(optimizer)
        options.scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):  # fused kernels read it where they run, and nobody waits
        optimizer.found_inf = loss.isfinite().logical_not().float()
        optimizer.step()
    elif loss.isfinite():
        optimizer.step()
    return loss, output


def _synchronized(model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Inside, DistributedDataParallel reduces gradients in backward only if `now`."""
    return contextlib.nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()
