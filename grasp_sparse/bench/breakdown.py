"""Where a training step spends its time: the operators' own CPU time, from torch's profiler, by what they are for."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

CATEGORIES = ("conv and linear", "norm", "activation", "pooling", "optimizer", "other")
# The first match counts, of the operator or else of the operator that called it; parts of lower-case operator names.
_PARTS = (
    ("optimizer", ("optimizer", "fused_sgd", "fused_adam")),
    ("norm", ("batch_norm", "batchnorm", "layer_norm", "layernorm", "group_norm", "groupnorm")),
    ("pooling", ("pool", "aten::mean", "meanbackward")),
    ("activation", ("relu", "gelu", "silu", "hardswish", "sigmoid", "tanh", "threshold", "hardtanh", "clamp_min")),
    # csr_conv2d_norm_train too: a convolution that does the norm behind it.
    ("conv and linear", ("conv", "linear", "addmm", "aten::mm", "mmbackward", "matmul", "grasp_sparse::", "mkldnn", "csr")),
)


def category(*names: str) -> str:
    """Of an operator, given its name and then its callers', innermost first."""
    for name in map(str.lower, names):
        for kind, parts in _PARTS:
            if any(part in name for part in parts):
                return kind
    return "other"


def breakdown(run: Callable[[], object], steps: int = 5) -> dict[str, float]:
    """Seconds in each of CATEGORIES of the fastest of `steps` steps, each profiled after one that is not; their sum is that step.

    What the profiler notes lies between a step's tensors and keeps their memory from being used again: in one profile of several
    steps of a ResNet-50 later ones took up to three times as long, in page faults of whatever was large. So each has a profile of its
    own, and as one can still meet them, the fastest counts. Time in worker threads is the calling thread's waiting for them, so
    shares are of wall time.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell stderr that it starts, stops and finds no GPU
    profiled = []
    for _ in range(steps):
        run()
        profiled.append(_profiled(run))
    return min(profiled, key=lambda seconds: sum(seconds.values()))


def _profiled(run: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for event in profiler.events():
        callers, caller = [event.name], event.cpu_parent
        while caller is not None:
            callers.append(caller.name)
            caller = caller.cpu_parent
        # The optimizer's range encloses ordinary operators, which are its own work.
        kind = "optimizer" if any("Optimizer." in name for name in callers) else category(*callers)
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds
