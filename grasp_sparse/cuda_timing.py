"""Seconds on a CUDA device, of things that are compared: in turns, and without the time Python takes to launch them.

A call is recorded once as a CUDA graph and replayed between two events. What a small layer costs in launches is a matter of
the framework and of torch.compile; what its kernels cost is what is compared here. A call that cannot be recorded (it waits
for the device, or its launches depend on data) is called as it is. Either way it waits behind enough idle work that launching does
not show.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch

from grasp_sparse.timing import Timing

_WARMUP = 3  # calls before recording: kernels are compiled and tuned in the first ones
_IDLE_CYCLES = 2_000_000  # about a millisecond, for launches: those of a call that is no graph, or the one of a graph


def recorded(run: Callable[[], object], pool: tuple[int, int] | None = None) -> Callable[[], object] | None:
    """Replays ``run``, recorded as a CUDA graph; None where that is not possible. Its tensors must live as long.

    Graphs of one ``pool`` made one after the other and replayed one at a time share their memory: results are for nobody to
    read. After None another pool is wanted. What ``run`` itself raises before anything is recorded is raised.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP - 1):
            run()
        waits = _waits(run)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if waits:
        return None
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception as error:
        _undo(graph, current, pool)
        if isinstance(error, RuntimeError):  # what CUDA and torch raise
            return None
        raise
    return graph.replay


def device_times(arms: Mapping[str, Callable[[], object]], rounds: int, *, lead_in: int = 1) -> dict[str, Timing]:
    """Runs the arms in turns (A B C A B C …), ``lead_in`` unmeasured calls of an arm before each measured one.

    Expects rounds >= 2 and a current CUDA device. Warns of arms that cannot be recorded. Graphs live in memory of their own, which
    is given back to the device at the end.
    """
    try:
        return _device_times(arms, rounds, lead_in)
    finally:
        torch.cuda.empty_cache()


def _device_times(arms: Mapping[str, Callable[[], object]], rounds: int, lead_in: int) -> dict[str, Timing]:
    pool, replays = torch.cuda.graph_pool_handle(), {}
    for name, run in arms.items():
        replays[name] = recorded(run, pool)
        if replays[name] is None:
            pool = torch.cuda.graph_pool_handle()
            warnings.warn(f"{name}: cannot be recorded as a CUDA graph, timed as it is called", RuntimeWarning, stacklevel=3)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        events = {}
        for name, run in arms.items():
            call = replays[name] or run
            for _ in range(lead_in):
                call()
            torch.cuda._sleep(_IDLE_CYCLES)
            start, end = events[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def _waits(run: Callable[[], object]) -> bool:
    """Calls ``run``; whether it waits for the device, which would end a recording in a state that is hard to leave."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not every wait is noticed
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _undo(graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """After a recording that was broken off: torch, whose end of it has raised, would go on in its stream, allocate from its pool
    and refuse random numbers."""
    torch.cuda.set_stream(current)
    graph.reset()
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        pass  # it was ended in order, and the graph has given its pool back
    else:
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    torch.cuda.synchronize()
