"""SGD with momentum in one pass over value, gradient and momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from grasp_sparse.optim.fused import FusedOptimizer, refuse_options, refuse_to_record_a_start


class SGD(FusedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD``: same arguments, same numbers to rounding, state_dicts that load into each other.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as ``torch.optim.SGD``.
        masks, during_backward, raw_gradients: see :class:`FusedOptimizer`.
        others: of torch's, if they are off.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        masks: Mapping[Tensor, Tensor] | None = None,
        during_backward: bool = False,
        raw_gradients: bool = False,
        **others,
    ) -> None:
        refuse_options(torch.optim.SGD, others)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, masks=masks, during_backward=during_backward, raw_gradients=raw_gradients,
        )

    def _calls(self, group: dict, parameters: list[Tensor]) -> list[Callable[[], None]]:
        if group["momentum"] == 0:
            return [partial(self._sgd, group, parameters, [], False)]
        old, new = ([], []), ([], [])  # parameters, their buffers
        # A first step that is left out leaves its buffers as they are.
        start = torch.empty_like if getattr(self, "found_inf", None) is None else torch.zeros_like
        for p in parameters:
            buffer = self.state[p].get("momentum_buffer")
            same, buffers = new if buffer is None else old
            same.append(p)
            buffers.append(start(p) if buffer is None else buffer)
        refuse_to_record_a_start(new[0])
        return [partial(self._sgd, group, *pair, pair is new) for pair in (old, new) if pair[0]]

    def _sgd(self, group: dict, parameters: list[Tensor], buffers: list[Tensor], first_step: bool) -> None:
        self._run(
            "sgd_update_", parameters, [buffers],
            float(group["lr"]), float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"]),
            group["nesterov"], group["maximize"], first_step,
        )
        # Of a step that was left out zeros are the state that follows, but with dampening, which the first gradient is spared. Asking
        # waits for the device.
        if first_step and not (group["dampening"] and self._was_left_out()):
            for parameter, buffer in zip(parameters, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
