"""A moving average of what training changes: values, biases, norms and running statistics; indices are not copied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from grasp_sparse.train.checkpoint import require


class Ema:
    """Averages of the floating-point tensors of `model`: average = d·average + (1 - d)·tensor after each update.

    d is `decay`, or (1 + updates) / (10 + updates) while that is less: the first steps are soon forgotten. A tensor with several
    names (tied weights) has one average, which `averages` holds under each of them, as a state dict holds the tensor. One that is not
    finite everywhere from the beginning, as a mask of minus infinity is, is copied: the average of infinities is no number.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        state = model.state_dict(keep_vars=True)
        named = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_floating_point()}
        self._of = {tensor: tensor.detach().clone() for tensor in dict.fromkeys(named.values())}  # by identity
        finite = {tensor: bool(average.isfinite().all()) for tensor, average in self._of.items()}
        self._averaged = [tensor for tensor in self._of if finite[tensor]]
        self._copied = [tensor for tensor in self._of if not finite[tensor]]
        self.averages = {name: self._of[tensor] for name, tensor in named.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Follow the model after its update number `updates`, from 1 on."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages = [self._of[tensor] for tensor in self._averaged]
        get_ema_multi_avg_fn(decay)(averages, [tensor.detach() for tensor in self._averaged], updates)
        for tensor in self._copied:
            self._of[tensor].copy_(tensor)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for live, average in self._of.items():
            live.data, average.data = average.data, live.data

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from the averages in a checkpoint. Raises UserError when they do not fit."""
        require(saved.keys() == self.averages.keys(), "ema", f"averages of {len(self.averages)} tensors of the model", list(saved))
        for name, average in self.averages.items():
            value = saved[name]
            fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (average.shape, average.dtype)
            require(fits and value.layout is torch.strided, f"{name} in ema", f"a tensor of shape {list(average.shape)}", value)
            average.copy_(value)
