"""Batch norm that adds a residual and applies ReLU while it is at it: fewer passes over memory than one layer after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_sparse.nn.kernels import looked_through, runs_here
from grasp_sparse.nn.relu import behaves_as, may_fuse
from grasp_sparse.nn.symbolic import called, is_symbolic
from grasp_sparse.ops.differentiable import call
from grasp_sparse.ops.dtypes import compute_dtype


FUSED_ON_CPU = (torch.float32, torch.float64, torch.bfloat16)  # of images


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, of which a call may ask for more: plus ``residual`` if given, then ReLU if ``relu``.

    Arguments, parameters, buffers, state_dict and running statistics are those of ``nn.BatchNorm2d``; the output has the layout
    of the input. One fused operation runs on the CPU in float32, float64 and bfloat16 (in evaluation, where nothing is
    differentiated), and on CUDA where x lies batch innermost, in float16 too. Everything else is computed by torch's own
    operations.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if is_symbolic(input):
            return called(self, input, residual=residual, relu=relu)
        if looked_through():
            y = super().forward(input)
            y = y if residual is None else y + residual
            return F.relu(y) if relu else y
        x = input
        self._check_input_dim(x)
        momentum = self.count_batch()
        running = self.running()
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        if not batch_statistics and self._differentiated(x, residual):
            # autograd keeps them until the backward, before which a training step may have moved on
            running = tuple(None if statistic is None else statistic.clone() for statistic in running)
        if x.numel() > 0 and runs_here(x, FUSED_ON_CPU) and self.takes(x.dtype, x.shape, residual, running):
            if batch_statistics and x.numel() > x.shape[1]:  # one value per channel: torch refuses it, in its own words
                y, mean, var = call("batch_norm_train", x, residual, self.weight, self.bias, self.eps, relu)
                self.follow(running, momentum, mean, var, x.numel() // x.shape[1])
                return y
            if not batch_statistics and (x.is_cuda or not self._differentiated(x, residual)):
                return call("batch_norm_eval", x, residual, self.weight, self.bias, *running, self.eps, relu)
        y = F.batch_norm(x, *running, self.weight, self.bias, batch_statistics, momentum, self.eps)
        if residual is not None:
            y += residual  # in place, as residual networks do: batch norm does not keep its output
        return F.relu(y, inplace=True) if relu else y

    def count_batch(self) -> float:
        """How much of the running statistics this batch replaces; counts it."""
        if not self.training or not self.track_running_stats or self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def running(self) -> tuple[Tensor | None, Tensor | None]:
        """The statistics that a call reads or moves."""
        return (self.running_mean, self.running_var) if not self.training or self.track_running_stats else (None, None)

    def takes(
        self, dtype: torch.dtype, shape: Sequence[int], residual: Tensor | None, running: tuple[Tensor | None, Tensor | None]
    ) -> bool:
        """Whether a fused operation is right for images of this dtype and shape: by the dtypes that are computed in, and the residual.

        running: the statistics that the call reads or moves, as :meth:`running` gives them.
        """
        computed = compute_dtype(dtype)
        if any(t is not None and t.dtype != computed for t in (self.weight, self.bias, *running)):
            return False
        if (running[0] is None) != (running[1] is None):
            return False
        return residual is None or (residual.shape == shape and residual.dtype == dtype)

    def _differentiated(self, *images: Tensor | None) -> bool:
        """Whether a gradient of this call is wanted. By given statistics it is several operations here, and one kernel in torch."""
        wanted = any(t is not None and t.requires_grad for t in (*images, self.weight, self.bias))
        return wanted and torch.is_grad_enabled()

    @staticmethod
    @torch.no_grad()
    def follow(running: tuple[Tensor | None, Tensor | None], momentum: float, mean: Tensor, var: Tensor, count: int) -> None:
        """The running statistics, if there are any, follow those of a batch of ``count`` values per channel."""
        if running[0] is None or running[1] is None:
            return
        torch.ops.grasp_sparse.batch_norm_follow_(*running, mean, var, momentum, count)
        if not torch.compiler.is_compiling():  # kernels write behind autograd's back; a compiler is told by the schema
            torch.autograd.graph.increment_version(running)


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None, relu: nn.Module | None = None) -> Tensor:
    """``relu(norm(x) + residual)``, in one operation if ``norm`` is a :class:`BatchNorm2d`.

    Not where a hook or a ``forward`` of its own is to see the norm or the ReLU alone, or ``relu`` is another activation.

    Args:
        relu: the module that is called, or passed over; None applies ``F.relu``.
    """
    if behaves_as(norm, BatchNorm2d) and may_fuse(norm, relu) and not is_symbolic(x):
        return norm(x, residual, relu=True)
    y = norm(x) if residual is None else norm(x) + residual
    return F.relu(y) if relu is None else relu(y)
