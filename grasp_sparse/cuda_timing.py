"""Seconds on a CUDA device, of things that are compared: in turns, and without the time Python takes to launch them.

A call is recorded once as a CUDA graph and replayed between two events. What a small layer costs in launches is a matter of
the framework and of torch.compile; what its kernels cost is what is compared here. A call that cannot be recorded (it waits
for the device, or its launches depend on data) is called as it is, behind enough idle work that launching does not show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from grasp_sparse.timing import Timing

_WARMUP = 3  # calls before recording: kernels are compiled and tuned in the first ones
_IDLE_CYCLES = 2_000_000  # about a millisecond, for the launches of a call that is no graph


def recorded(run: Callable[[], object]) -> Callable[[], object] | None:
    """Replays ``run``, recorded as a CUDA graph; None where that is not possible. Its tensors must live as long.

    Graphs made one after the other and replayed one at a time share their memory: results are for nobody to read.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=_pool()):
            run()
    except RuntimeError:
        torch.cuda.set_stream(current)  # a recording that cannot be ended leaves its own behind
        _pool.cache_clear()  # and its pool may still be recorded into
        torch.cuda.synchronize()
        return None
    return graph.replay


def device_times(arms: Mapping[str, Callable[[], object]], rounds: int, *, lead_in: int = 1) -> dict[str, Timing]:
    """Runs the arms in turns (A B C A B C …), ``lead_in`` unmeasured calls of an arm before each measured one.

    Expects rounds >= 2 and a current CUDA device.
    """
    replays = {name: recorded(run) for name, run in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        events = {}
        for name, run in arms.items():
            call = replays[name] or run
            for _ in range(lead_in):
                call()
            if replays[name] is None:
                torch.cuda._sleep(_IDLE_CYCLES)
            start, end = events[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing.of(taken) for name, taken in seconds.items()}


@functools.cache
def _pool():
    return torch.cuda.graph_pool_handle()
