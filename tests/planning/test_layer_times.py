"""What is measured is looked at twice."""

from __future__ import annotations

import pytest
import torch
from small_net import X, masks_of
from torch import nn

import grasp_sparse as gs
from grasp_sparse.planning import Times

pytestmark = pytest.mark.skipif(not gs._extension.status().loaded, reason="without compiled kernels nothing is measured")


class TestSecondLook:
    """A machine that is slow for a moment, and not by one factor, is seen again some time later."""

    def test_small_layers_come_first_and_the_fastest_of_both_looks_count(self, net, stopwatch):
        first = [Times(40e-3, 36e-3, 24e-3), *[Times(2e-3, 2e-3, 1e-3)] * 2]
        looks = iter([*first, Times(0.15e-3, 0.14e-3, 0.18e-3), *[Times(3e-3, 1e-3, 2e-3)] * 2])
        stopwatch.set(lambda *asked: next(looks))
        stopwatch.look_again()
        rows = gs.plan(net, masks_of(net), X).rows
        sizes = [layer.weight.numel() for layer, _, _ in stopwatch.measured]
        assert sizes == sorted(sizes[:3]) * 2
        smallest, *others = sorted(rows, key=lambda row: torch.Size(row.shape).numel())
        assert (smallest.times, smallest.runs) == ((0.15e-3, 0.14e-3, 0.18e-3), "masked")
        assert {row.times for row in others} == {(2e-3, 1e-3, 1e-3), (4e-3, 2e-3, 2e-3)}  # one of them is called twice

    def test_what_took_long_outlasted_the_moment(self, net, stopwatch):
        gs.plan(net, masks_of(net), X)
        assert len(stopwatch.measured) == 3

    def test_a_count_nearby_takes_over_what_the_second_look_found(self, stopwatch):
        looks = iter([Times(3e-3, 3e-3, 1e-3), Times(1e-3, 1e-3, 1e-3)])
        stopwatch.set(lambda *asked: next(looks))
        stopwatch.look_again()
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        masks = {f"{i}.weight": (torch.randperm(4096) < count).view(64, 64) for i, count in ((1, 1000), (2, 1010))}
        assert set(gs.plan(model, masks, torch.randn(8, 64)).values()) == {"masked"}
