"""A layer's seconds are a line in its kept weights until masked is faster."""

from __future__ import annotations

import pytest
import torch
from small_net import ReadsWeight
from torch import nn

import grasp_sparse as gs
from grasp_sparse.planning import Times, measure
from grasp_sparse.planning.cost_model import LayerCost, layer_costs

pytestmark = pytest.mark.skipif(not gs._extension.status().loaded, reason="without compiled kernels nothing is measured")


def test_the_faster_way_counts():
    cost = LayerCost(weights=1000, dense=5.0, masked=6.0, fixed=1.0, slope=0.01)
    assert [cost.seconds(kept) for kept in (0, 100, 499, 501, 999, 1000)] == pytest.approx([1.0, 2.0, 5.99, 6.0, 6.0, 5.0])


@pytest.fixture
def linear_times(monkeypatch):
    def measure_layer(layer, mask, given, block_size=None):
        return Times(2e-3, 3e-3, 1e-4 + 2e-6 * int(mask.sum()) * (given.shape[0] / 4))

    monkeypatch.setattr(measure, "measure_layer", measure_layer)


def test_the_line_is_found_and_calls_are_added_up(linear_times):
    layer = nn.Linear(40, 40)
    costs = layer_costs(nn.Sequential(layer, layer), ["0.weight"], torch.randn(4, 40))["0.weight"]
    # the first call's input needs no gradient, the second's does: two inputs, measured one by one
    assert costs == pytest.approx((1600, 4e-3, 6e-3, 2e-4, 4e-6))


def test_a_weight_never_seems_free(monkeypatch):
    monkeypatch.setattr(measure, "measure_layer", lambda layer, mask, given, block_size: Times(1e-3, 1e-3, 1e-3 / int(mask.sum())))
    cost = layer_costs(nn.Sequential(nn.Linear(40, 40)), ["0.weight"], torch.randn(4, 40))["0.weight"]
    assert cost.slope == pytest.approx(0.01 * 1e-3 / 1600)


def test_what_is_not_called_costs_nothing(linear_times):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].spare = nn.Linear(4, 4)
    assert layer_costs(model, ["0.spare.weight"], torch.randn(2, 4))["0.spare.weight"] == (16, 0, 0, 0, 0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_can_only_run_masked_costs_nothing_by_the_weight(linear_times):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)
    name = "layers.0.linear1.weight"
    cost = layer_costs(model, [name], torch.randn(2, 5, 16))[name]
    assert cost.slope == 0 and cost.fixed == cost.masked == 3e-3


def test_nor_does_a_weight_that_the_model_reads(linear_times):
    costs = layer_costs(ReadsWeight(), ["wi.weight", "wo.weight"], torch.randn(4, 8))
    assert costs["wi.weight"].slope == pytest.approx(2e-6)
    assert costs["wo.weight"].slope == 0 and costs["wo.weight"].seconds(1) == costs["wo.weight"].masked == 3e-3
