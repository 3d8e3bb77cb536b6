"""A small network, and a stopwatch in the place of measuring."""

from __future__ import annotations

import pytest
from small_net import Net

from grasp_sparse.planning import Times, layer_times, measure


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def stopwatch(monkeypatch):
    """Measuring by rule: a call of `stopwatch.set(rule)` makes rule(layer, kept, given) the times; `measured` is what was asked.

    What has been measured is not looked at again, unless `stopwatch.look_again()`.
    """

    class Stopwatch:
        def __init__(self) -> None:
            self.measured: list = []

        def set(self, rule) -> None:
            def measure_layer(layer, mask, given, block_size=None):
                self.measured.append((layer, int(mask.sum()), given))
                return rule(layer, int(mask.sum()), given)

            monkeypatch.setattr(measure, "measure_layer", measure_layer)

        def look_again(self, unless_it_took: float = 1.0) -> None:
            monkeypatch.setattr(layer_times, "_LONG_LOOK", unless_it_took)

    watch = Stopwatch()
    watch.set(lambda layer, kept, given: Times(2e-3, 2e-3, 1e-3))
    watch.look_again(unless_it_took=0)
    return watch
