"""What is done around CUDA graphs, on a stand-in for a device: a recording that fails leaves nothing behind."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from grasp_sparse import cuda_timing

MAIN, SIDE = "the main stream", "a side stream"


class Device:
    """The parts of torch.cuda that are used, and what they would leave behind."""

    def __init__(self) -> None:
        self.stream, self.mode, self.pools, self.open, self.recording = MAIN, 0, 0, set(), False
        self.clock, self.log, self.capturing_generator = 0.0, [], False

    def invalid(self) -> None:
        """What a call does that cannot be recorded, and does not show it before."""
        if self.recording:
            raise RuntimeError("operation not permitted when stream is capturing")

    def wait(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.invalid()

    @contextmanager
    def in_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, graph, pool):
        self.stream, self.recording, self.capturing_generator = SIDE, True, True
        self.open.add(pool)
        self.log.append(pool)
        try:
            yield
        finally:
            self.recording = False
        # as torch does, only where all went well
        self.stream, self.capturing_generator = MAIN, False
        self.open.remove(pool)

    def end(self, device, pool) -> None:
        if pool not in self.open:
            raise RuntimeError("not recording to this pool")
        self.open.remove(pool)

    def new_pool(self):
        self.pools += 1
        return 0, self.pools

    def generator(self):
        return SimpleNamespace(clone_state=lambda: "fresh", graphsafe_set_state=self.set_generator)

    def set_generator(self, state) -> None:
        assert state == "fresh"
        self.capturing_generator = False

    def clean(self) -> bool:
        return self.stream == MAIN and not self.open and not self.capturing_generator and self.mode == 0


class Event:
    def __init__(self, device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.clock

    def elapsed_time(self, end) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def device(monkeypatch):
    device = Device()
    stand_ins = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "stream": device.in_stream,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None, name=device.stream),
        "set_stream": lambda stream: setattr(device, "stream", stream.name), "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: device.log.append("replay"), reset=lambda: None), "graph": device.graph,
        "graph_pool_handle": device.new_pool, "get_sync_debug_mode": lambda: device.mode,
        "set_sync_debug_mode": lambda mode: setattr(device, "mode", mode), "current_device": lambda: 0,
        "default_generators": [device.generator()], "empty_cache": lambda: device.log.append("emptied"),
        "Event": lambda enable_timing: Event(device), "_sleep": lambda cycles: device.log.append("idle"),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: device.log.append(("released", pool)), raising=False)
    return device


def test_a_call_is_recorded_after_warming_up(device):
    calls = []
    replay = cuda_timing.recorded(lambda: calls.append(device.recording))
    assert calls == [False] * 3 + [True] and device.clean()
    replay()
    assert device.log == [(0, 1), "replay"]


def test_a_call_that_waits_is_never_recorded(device):
    assert cuda_timing.recorded(device.wait) is None
    assert not device.log and device.clean()


def test_a_recording_that_fails_is_undone(device):
    assert cuda_timing.recorded(device.invalid) is None
    assert device.clean() and device.log == [(0, 1), ("released", (0, 1))]


def test_an_error_of_the_call_itself_is_raised(device):
    def out_of_memory() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(ZeroDivisionError):
        cuda_timing.recorded(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_timing.recorded(out_of_memory)


def test_each_timing_has_a_pool_of_its_own_and_says_what_it_did_not_record(device):
    def takes(seconds):
        def run() -> None:
            device.clock += seconds

        return run

    def fails() -> None:
        device.invalid()
        device.clock += 2

    with pytest.warns(RuntimeWarning, match="^bad: cannot be recorded"):
        times = cuda_timing.device_times({"good": takes(1), "bad": fails, "other": takes(3)}, 2)
    assert times["bad"].median == 2  # called as it is; the stand-in's replays take no time
    pools = [entry for entry in device.log if isinstance(entry, tuple) and entry[0] == 0]
    assert pools == [(0, 1), (0, 1), (0, 2)]  # the failed one's is not used again
    assert device.log[-1] == "emptied" and device.clean()
    timed = [entry for entry in device.log if entry in ("replay", "idle")]
    assert timed == ["replay", "idle", "replay", "idle", "replay", "idle", "replay"] * 2  # whatever is measured, the device is busy before
    cuda_timing.device_times({"good": takes(1)}, 2)
    assert (0, 3) in device.log


def test_memory_is_given_back_after_an_error(device):
    with pytest.raises(ZeroDivisionError):
        cuda_timing.device_times({"bad": lambda: 1 / 0}, 2)
    assert device.log[-1] == "emptied"
