"""AdamW in one pass over value, gradient and both moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from grasp_sparse.optim.fused import FusedOptimizer, refuse_options, refuse_to_record_a_start


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` without amsgrad: same arguments, same numbers to rounding, state_dicts that load into each other.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as ``torch.optim.AdamW``.
        masks, during_backward, raw_gradients: see :class:`FusedOptimizer`.
        others: of torch's, if they are off.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        masks: Mapping[Tensor, Tensor] | None = None,
        during_backward: bool = False,
        raw_gradients: bool = False,
        **others,
    ) -> None:
        refuse_options(torch.optim.AdamW, others)
        super().__init__(
            params, lr, betas, eps, weight_decay,
            maximize=maximize, masks=masks, during_backward=during_backward, raw_gradients=raw_gradients,
        )

    def _calls(self, group: dict, parameters: list[Tensor]) -> list[Callable[[], None]]:
        refuse_to_record_a_start([p for p in parameters if not self.state.get(p)])
        return [partial(self._adamw, group, parameters)]

    def _adamw(self, group: dict, parameters: list[Tensor]) -> None:
        states = [self.state[p] or self._start(p) for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if parameter.is_cuda and not state["step"].is_cuda:  # from a state_dict of torch's AdamW, which counts on the CPU
                state["step"] = state["step"].to(parameter.device)
        tensors = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        beta1, beta2 = group["betas"]
        self._run(
            "adamw_update_", parameters, tensors,
            float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]), group["maximize"],
        )

    def _start(self, parameter: Tensor) -> dict:
        state = self.state[parameter]
        # As torch's fused AdamW: where the parameter is, so that a CUDA graph counts too, in float32 unless float64 is the default.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        state["step"] = torch.zeros((), dtype=dtype, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
