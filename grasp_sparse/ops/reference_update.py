"""The definition of the optimizer steps in plain torch: the fallback on any device and for any floating dtype, and what
kernels are tested against. The formulas and their order are those of torch.optim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_sparse.bits import unpack_like
from grasp_sparse.ops.schema import UPDATE_SCHEMAS


def sgd_update_(
    values, grads, momentum_buffers, mask_bits, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step, found_inf=None
) -> None:
    _check(values, [grads, momentum_buffers] if momentum_buffers else [grads], mask_bits)
    if _is_left_out(found_inf):
        return
    for i, (value, grad) in enumerate(zip(values, grads, strict=True)):
        kept = _kept(mask_bits, i, value)
        grad = _gradient(grad, kept, maximize)
        if weight_decay != 0:
            grad = grad.add(value, alpha=weight_decay)
        buffer = momentum_buffers[i] if momentum_buffers else None
        if buffer is not None:
            if first_step:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        value.add_(grad, alpha=-lr)
        _zero_pruned_(kept, value, buffer)


def adamw_update_(
    values, grads, exp_avgs, exp_avg_sqs, steps, mask_bits, lr, beta1, beta2, eps, weight_decay, maximize, found_inf=None
) -> None:
    _check(values, [grads, exp_avgs, exp_avg_sqs], mask_bits)
    if len(steps) != len(values) or any(step.numel() != 1 for step in steps):
        raise ValueError(f"Expected {len(values)} steps of one number each, got {[list(step.shape) for step in steps]}.")
    if _is_left_out(found_inf):
        return
    for i, (value, grad, exp_avg, exp_avg_sq, step) in enumerate(zip(values, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        kept = _kept(mask_bits, i, value)
        grad = _gradient(grad, kept, maximize)
        step.add_(1)
        t = step.item()
        value.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = (exp_avg_sq.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
        value.addcdiv_(exp_avg, spread, value=-lr / (1 - beta1**t))
        _zero_pruned_(kept, value, exp_avg, exp_avg_sq)


def _check(values: Sequence[Tensor], others: Sequence[Sequence[Tensor]], mask_bits: Sequence[Tensor]) -> None:
    """ValueError unless every list is as long as ``values`` and its tensors are like them; nothing has been written yet."""
    if any(len(tensors) != len(values) for tensors in (*others, mask_bits or values)):
        raise ValueError(f"Expected {len(values)} gradients and states like values, and as many mask_bits or none.")
    for i, value in enumerate(values):
        for tensor in (tensors[i] for tensors in others):
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"Expected gradient and state of values[{i}] as {value.dtype} {list(value.shape)}, got {got}.")
        bits, size = mask_bits[i] if mask_bits else None, -(-value.numel() // 8)
        if bits is not None and bits.numel() and (bits.shape != (size,) or bits.dtype != torch.uint8):
            raise ValueError(f"Expected mask_bits[{i}] of {size} bytes (uint8) or none, got {bits.dtype} {list(bits.shape)}.")


def _is_left_out(found_inf: Tensor | None) -> bool:
    if found_inf is None:
        return False
    if found_inf.numel() != 1 or found_inf.dtype != torch.float32:
        raise ValueError(f"Expected found_inf of one float32 number, got {found_inf.dtype} {list(found_inf.shape)}.")
    return found_inf.item() != 0


def _kept(mask_bits: Sequence[Tensor], i: int, value: Tensor) -> Tensor | None:
    return unpack_like(mask_bits[i], value) if mask_bits and mask_bits[i].numel() else None


def _gradient(grad: Tensor, kept: Tensor | None, maximize: bool) -> Tensor:
    grad = -grad if maximize else grad
    return grad if kept is None else torch.where(kept, grad, 0)  # not a product: NaN times zero is NaN


def _zero_pruned_(kept: Tensor | None, *tensors: Tensor | None) -> None:
    if kept is not None:
        for tensor in tensors:
            if tensor is not None:
                tensor.masked_fill_(~kept, 0)


_library = torch.library.Library("grasp_sparse", "IMPL")
for _name in UPDATE_SCHEMAS:
    _library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
