"""Who runs sparse is what was measured to be faster; what has no choice, or a plan of the caller's own, is not measured."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter

import pytest
import torch
from small_net import Net, ReadsWeight, X, masks_of
from torch import nn
from torch._subclasses import FakeTensorMode

import grasp_sparse as gs
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from grasp_sparse.ops import triton as ops_triton
from grasp_sparse.patterns import get_pattern
from grasp_sparse.planning import Times, cache, density_plan, measure, measured_plan
from grasp_sparse.planning.inputs import LayerInput
from grasp_sparse.targets import Target

pytestmark = pytest.mark.skipif(not gs._extension.status().loaded, reason="without compiled kernels nothing is measured")


class TestDecision:
    def test_the_faster_way_is_taken(self, net, stopwatch):
        stopwatch.set(lambda layer, kept, given: Times(5e-3, 4e-3, 1e-3 if isinstance(layer, nn.Conv2d) else 9e-3))
        masks = masks_of(net)
        report = gs.sparsify_(net, masks, X)
        assert [type(m) for m in (net.first, net.second, net.head)] == [SparseConv2d, SparseConv2d, MaskedLinear]
        assert [row.runs for row in report.rows] == ["sparse", "sparse", "masked"]
        assert report.rows[2].reason == "sparse takes 2.25 of the masked time"

    @pytest.mark.parametrize("sparse, runs", [(0.96e-3, "sparse"), (0.98e-3, "masked"), (1.5e-3, "masked")])
    def test_sparse_has_to_win_by_more_than_noise(self, net, stopwatch, sparse, runs):
        stopwatch.set(lambda layer, kept, given: Times(1e-3, 1e-3, sparse))
        assert set(gs.plan(net, masks_of(net), X).values()) == {runs}

    @pytest.mark.parametrize("head, runs", [((2e-6, 1.5e-6), "masked"), ((2e-6, 1e-6), "sparse"), ((6e-6, 4.2e-6), "sparse")])
    def test_a_small_gain_has_to_be_clear(self, net, stopwatch, head, runs):
        """Of convolutions that take a millisecond and a half and a head: nobody sees a thousandth of all, unless it wins by half."""
        stopwatch.set(lambda layer, *_: Times(1e-3, 1e-3, 0.5e-3) if isinstance(layer, nn.Conv2d) else Times(head[0], *head))
        *others, row = gs.plan(net, masks_of(net), X).rows
        assert row.runs == runs and {other.runs for other in others} == {"sparse"}
        assert ("too little of the whole to be sure of" in row.reason) == (runs == "masked")

    def test_small_gains_are_left_out_only_as_far_as_all_of_them_do_not_show(self, stopwatch):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(1000)))
        stopwatch.set(lambda *_: Times(1e-3, 1e-3, 0.8e-3))
        runs = Counter(gs.plan(model, masks_of(model), torch.randn(3, 8)).values())
        assert 3 <= runs["masked"] <= 4 and runs["masked"] + runs["sparse"] == 1000  # 0.2 of 800 are a thousandth of all and a bit

    def test_calls_and_layers_of_one_weight_are_added_up(self, stopwatch):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        stopwatch.set(lambda layer, kept, given: Times(1e-3, 2e-3, 3e-3 if given.needs_grad else 1e-4))
        row = gs.plan(model, {"0.weight": masks_of(model)["0.weight"]}, torch.randn(3, 8)).rows[0]
        assert row.times == pytest.approx((2e-3, 4e-3, 3.1e-3)) and row.layers == ("0", "2") and row.runs == "sparse"
        row = next(row for row in gs.plan(Net(), masks_of(Net()), X).rows if row.layers == ("second",))
        assert row.times == pytest.approx((2e-3, 4e-3, 6e-3)) and row.runs == "masked"

    def test_what_has_no_choice_is_not_measured(self, stopwatch):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4))
        masks = {"0.weight": masks_of(model)["0.weight"], "2.weight": torch.ones(4, 64, dtype=torch.bool)}
        plan = gs.plan(model, masks, torch.randn(2, 4, 6, 6))
        assert dict(plan) == {"0.weight": "masked", "2.weight": "dense"} and not stopwatch.measured

    @pytest.mark.parametrize("density", [0.5, 0.1])
    def test_a_layer_that_is_not_called_keeps_its_weight_and_says_so(self, net, stopwatch, density):
        net.spare = nn.Linear(8, 8)
        row = gs.plan(net, masks_of(net, density), X).rows[-1]
        assert (row.runs, row.reason, row.times) == ("masked", "not called on the example", None)

    def test_without_kernels_density_decides_and_the_reason_says_so(self, net, stopwatch, monkeypatch):
        monkeypatch.setattr(gs._extension, "_status", gs._extension.ExtensionStatus(False, "test", "reference", (), {}))
        report = gs.sparsify_(net, masks_of(net), X)
        assert {row.runs for row in report.rows} == {"sparse"} and not stopwatch.measured
        assert {row.reason for row in report.rows} == {"not measured: no compiled kernels for cpu"}

    @pytest.mark.parametrize("arguments", [{}, {"plan": "density", "example_input": X}, {"max_density": 0.3, "example_input": X}])
    def test_density_decides_when_asked_and_without_an_example(self, net, stopwatch, arguments):
        report = gs.sparsify_(net, masks_of(net), **arguments)
        assert {row.runs for row in report.rows} == {"sparse"} and not stopwatch.measured

    @pytest.mark.parametrize("arguments", [{"plan": "density"}, {"max_density": 0.3}])
    def test_by_density_too_a_layer_that_an_example_does_not_call_keeps_its_weight(self, arguments):
        """Nothing that this example calls is given a tensor by position: not even the model itself."""

        class Products(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q = nn.Linear(8, 8)

            def forward(self, x):
                return nn.functional.linear(x, self.q.weight, self.q.bias)

        model = Products()
        masks = masks_of(model)
        assert gs.sparsify_(copy.deepcopy(model), masks, **arguments).rows[0].runs == "sparse"
        row = gs.sparsify_(model, masks, {"x": torch.randn(3, 8)}, **arguments).rows[0]
        assert (row.runs, row.reason) == ("masked", "not called on the example")
        assert model(torch.randn(3, 8)).isfinite().all()

    READ = "its weight is read outside the layer"

    @pytest.mark.parametrize("arguments", [{}, {"plan": "density"}, {"max_density": 0.3}])
    def test_a_layer_whose_weight_the_model_reads_keeps_it_and_says_so(self, stopwatch, arguments):
        model, x = ReadsWeight(), torch.randn(3, 8)
        report = gs.sparsify_(model, masks_of(model), x, **arguments)
        assert [(row.runs, row.reason) for row in report.rows] == [("sparse", ""), ("masked", self.READ)]
        assert len(stopwatch.measured) == (not arguments) and report.rows[1].input_shape == (3, 16)
        model(x).sum().backward()

    def test_of_layers_that_share_a_weight_one_is_enough(self, stopwatch):
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False), ReadsWeight())
        model[0].weight, model[1].weight = model[2].wi.weight, model[2].wo.weight
        plan = gs.plan(model, masks_of(model), torch.randn(3, 8))
        assert dict(plan) == {"0.weight": "sparse", "1.weight": "masked"}
        assert plan.rows[1].layers == ("1", "2.wo") and plan.rows[1].reason == self.READ

    def test_who_asks_for_sparse_gets_it(self):
        model = ReadsWeight()
        masks = masks_of(model)
        gs.sparsify_(model, masks, torch.randn(3, 8), plan=dict.fromkeys(masks, "sparse"))
        assert isinstance(model.wo, SparseLinear)
        with pytest.raises(AttributeError, match="stores only its kept weights.* example_input shows .* its weight is read outside"):
            model(torch.randn(3, 8))

    def test_the_reason_outlives_the_example(self, stopwatch):
        model = ReadsWeight()
        masks = masks_of(model)
        plan = gs.plan(model, masks, torch.randn(3, 8))
        assert plan.rows[1].reason == gs.sparsify_(model, masks, plan=plan).rows[1].reason == self.READ


class TestBlocksOnCuda:
    """On tensors of a device that is not there: nothing is computed before the answer."""

    @staticmethod
    def target(pattern: str) -> Target:
        with FakeTensorMode():
            mask = torch.empty(128, 128, dtype=torch.bool, device="cuda")
        return Target(("weight",), {"": nn.Linear(128, 128)}, mask, 1024, None, "", get_pattern(pattern))

    @pytest.mark.parametrize("pattern, runs", [("block(32, 16)", "sparse"), ("block(8, 8)", "masked"), ("block(48, 16)", "masked")])
    def test_without_a_kernel_they_run_masked_and_the_reason_says_so(self, pattern, runs):
        pytest.importorskip("triton")
        row = density_plan([self.target(pattern)], {}, 0.3).rows[0]
        assert row.runs == runs and ("have no kernel on cuda; sides of 16, 32, 64, 128 do" in row.reason) == (runs == "masked")

    def test_nor_are_they_measured(self, stopwatch):
        pytest.importorskip("triton")
        target = self.target("block(8, 8)")
        inputs = {"": Counter([LayerInput((3, 128), "row-major", torch.float32, True)])}
        assert measured_plan([target], inputs).rows[0].runs == "masked" and not stopwatch.measured

    def test_as_single_weights_they_run_where_these_have_kernels(self, monkeypatch):
        pytest.importorskip("triton")
        measured = []
        monkeypatch.setattr(gs._extension, "_status", dataclasses.replace(gs._extension.status(), cuda_reason=None))
        monkeypatch.setattr(cache, "layer_key", lambda layer, given, kind: kind)
        monkeypatch.setattr(
            measure, "measure_layer", lambda layer, mask, given, stored: measured.append(stored) or Times(2e-3, 2e-3, 1e-3)
        )
        inputs = {"": Counter([LayerInput((3, 128), "row-major", torch.float32, True)])}
        lack = "blocks 8x8 have no kernel on cuda; sides of 16, 32, 64, 128 do"
        for plan in (density_plan([self.target("block(8, 8)")], {}, 0.3), measured_plan([self.target("block(8, 8)")], inputs)):
            assert (plan.rows[0].runs, plan.rows[0].block_size, plan.rows[0].reason) == ("sparse", None, lack)
        assert measured_plan([self.target("block(16, 16)")], inputs).rows[0].block_size == (16, 16)
        assert measured == [None, (16, 16), None]

    def test_nor_is_any_block_without_triton(self, monkeypatch):
        monkeypatch.setattr(ops_triton, "_INSTALLED", False)
        row = density_plan([self.target("block(32, 32)")], {}, 0.3).rows[0]
        assert (row.runs, row.reason) == ("masked", "Triton is not installed")


class TestGivenPlan:
    def test_a_plan_is_carried_out_without_measuring(self, net, stopwatch):
        masks = masks_of(net)
        stopwatch.set(lambda layer, kept, given: Times(1e-3, 1e-3, 2e-3))
        plan = gs.plan(net, masks, X)
        stopwatch.measured.clear()
        report = gs.sparsify_(net, masks, plan=plan)
        assert isinstance(net.first, MaskedConv2d) and not stopwatch.measured
        assert report.rows[0].times == plan.rows[0].times and report.rows[0].reason == plan.rows[0].reason

    def test_a_plan_of_ones_own(self, net):
        masks = masks_of(net)
        gs.sparsify_(net, masks, plan=json.loads(json.dumps({name: "masked" for name in masks} | {"head.weight": "sparse"})))
        assert isinstance(net.second, MaskedConv2d) and isinstance(net.head, SparseLinear)

    @pytest.mark.parametrize(
        "plan, message",
        [
            ({"first.weight": "sparse"}, "second.weight: Expected a plan that says 'sparse' or 'masked', got none"),
            ({name: "fast" for name in ("first.weight", "second.weight", "head.weight")}, "first.weight: .* got 'fast'"),
            ("fast", "Expected plan to be \"auto\", \"density\" or a mapping from parameter names, got 'fast'"),
            (3, "Expected plan to be .*, got 3"),
        ],
    )
    def test_refusal_comes_before_any_change(self, net, plan, message):
        with pytest.raises(ValueError, match=message):
            gs.sparsify_(net, masks_of(net), plan=plan)
        assert type(net.first) is nn.Conv2d

    def test_what_is_not_possible_is_refused(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
        with pytest.raises(ValueError, match=r"says 'masked' \(2 groups\), got 'sparse'"):
            gs.sparsify_(model, masks_of(model), plan={"0.weight": "sparse"})

    def test_a_plan_and_a_limit_are_refused(self, net):
        with pytest.raises(ValueError, match="Expected a plan or max_density, got both"):
            gs.sparsify_(net, masks_of(net), plan={}, max_density=0.5)


def test_tables_show_what_was_measured(net, stopwatch):
    masks = masks_of(net)
    plan = gs.plan(net, masks, X)
    line = next(line for line in str(plan).splitlines() if line.startswith("second"))
    assert line.split() == ["second", "8x8x3x3", "4x8x6x6", "nchw", "116", "20.14%", "4.000", "4.000", "2.000", "0.50", "sparse"]
    text = str(gs.sparsify_(net, masks, X))
    assert "masked ms" in text and "4.000" in text
    assert "masked ms" not in str(gs.sparsify_(Net(), masks))
