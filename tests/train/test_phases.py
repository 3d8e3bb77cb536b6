"""The phases of a step: together they are the step, and each holds what is done in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.phases import PHASES, PhaseClock, median_phases
from grasp_sparse.train.step import loss_function
from grasp_sparse.train.timing import measure_phases


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Slow(torch.autograd.Function):
    """Passes its input on; forward and backward take as long as the clock is told."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.backward = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += ctx.backward
        return gradient, None, None, None


class _Net(nn.Linear):
    def __init__(self, clock: _Clock) -> None:
        super().__init__(4, 3)
        self.clock = clock

    def forward(self, x):
        return _Slow.apply(super().forward(x), self.clock, 1.0, 3.0)


class _SlowSgd(torch.optim.SGD):
    def step(self, closure=None):
        self.clock.now += 5.0
        return super().step(closure)


def _watched(passes: int) -> list[dict[str, float]]:
    clock = _Clock()
    model, watch = _Net(clock), PhaseClock(clock=clock)
    optimizer = _SlowSgd(model.parameters(), lr=0.1)
    optimizer.clock = clock

    def slow_loss(logits, targets):
        clock.now += 0.25
        return _Slow.apply(nn.functional.cross_entropy(logits, targets), clock, 0.25, 0.125)

    loss_fn = watch.watch(model, optimizer, slow_loss)

    def step():
        optimizer.zero_grad()
        clock.now += 0.5
        for _ in range(passes):
            loss_fn(model(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
        optimizer.step()
        clock.now += 0.0625

    run = watch.timed(step)
    run()
    run()
    return watch.steps


def test_each_phase_has_what_is_done_in_it() -> None:
    expected = {"forward": 1.0, "loss": 0.5, "backward": 3.125, "update": 5.0, "other": 0.5625}
    assert _watched(1) == [expected, expected]


def test_accumulated_passes_add_up() -> None:
    step = _watched(2)[0]
    assert (step["forward"], step["loss"], step["update"]) == (2.0, 1.0, 5.0)
    assert sum(step.values()) == pytest.approx(0.5 + 2 * (1.0 + 0.5 + 3.125) + 5.0 + 0.0625)


def test_phases_of_training_steps_are_measured_for_both() -> None:
    config = TrainConfig(timing_rounds=3)
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_phases(config, model, model, batches, "dense nchw")
    assert list(found) == ["dense nchw", "sparse"] and all(tuple(phases) == PHASES for phases in found.values())
    assert all(found[arm][phase] > 0 for arm in found for phase in ("forward", "loss", "backward", "update"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_median_is_of_each_phase_by_itself() -> None:
    assert median_phases([{"a": 1, "b": 9}, {"a": 2, "b": 1}, {"a": 30, "b": 2}], ("a", "b")) == {"a": 2, "b": 2}


def test_a_watched_loss_is_the_loss() -> None:
    model = nn.Linear(4, 3)
    watch = PhaseClock()
    watch.steps.append(dict.fromkeys(PHASES, 0.0))
    loss_fn = loss_function(TrainConfig())
    x, y = torch.randn(2, 4), torch.tensor([0, 2])
    assert torch.equal(watch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)(x, y), loss_fn(x, y))
