"""Who runs sparse is what was measured to be faster; what was measured once is not measured again."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter

import pytest
import torch
from small_net import Net, ReadsWeight, X
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import grasp_sparse as gs
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from grasp_sparse.ops import triton as ops_triton
from grasp_sparse.patterns import get_pattern
from grasp_sparse.planning import Times, cache, density_plan, layer_times, measure, measured_plan
from grasp_sparse.planning.inputs import LayerInput
from grasp_sparse.targets import Target


@pytest.fixture
def net():
    return Net()


class Casts(TorchDispatchMode):
    """The shapes of what is made bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


def masks_of(model: nn.Module, density: float = 0.2) -> dict[str, torch.Tensor]:
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    return {name: (torch.randperm(p.numel()) < density * p.numel()).view(p.shape) for name, p in weights.items()}


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


class TestMeasuring:
    @pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 4), (3, 6)), (nn.Conv2d(2, 4, 3, bias=False), (2, 2, 5, 5))])
    def test_the_model_is_not_touched(self, layer, shape):
        layer.register_forward_hook(lambda *_: pytest.fail("a hook of the model ran"))
        mask = torch.rand_like(layer.weight) < 0.5
        before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
        times = measure.measure_layer(layer, mask, LayerInput(shape, "row-major", torch.float32, True), rounds=2)
        assert all(0 < seconds < 10 for seconds in times)
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())
        assert all(parameter.grad is None for parameter in layer.parameters()) and torch.equal(torch.get_rng_state(), state)

    def test_convolutions_of_single_weights_are_measured_as_they_run_on_cuda(self):
        given = LayerInput((4, 6, 5, 5), "channels_last", torch.float32, True)
        with FakeTensorMode():
            conv, linear = nn.Conv2d(6, 8, 3, device="cuda"), nn.Linear(6, 8, device="cuda")
        assert measure._input_of_sparse(conv, given, None) == given._replace(layout="batch-innermost")
        assert measure._input_of_sparse(conv, given, (16, 16)) == given == measure._input_of_sparse(nn.Conv2d(6, 8, 3), given, None)
        rows = LayerInput((4, 6), "row-major", torch.float32, True)
        assert measure._input_of_sparse(linear, rows, None) == rows

    def test_half_precision_and_frozen_layers_can_be_measured(self, net):
        net.bfloat16()
        net.first.requires_grad_(False)
        plan = gs.plan(net, masks_of(net), X)
        assert all(row.times and row.runs in ("sparse", "masked") for row in plan.rows)

    @pytest.mark.parametrize("kind", [nn.Linear, MaskedLinear, SparseLinear])
    def test_under_autocast_every_call_casts_its_weight(self, kind):
        dense = nn.Linear(100, 90)
        layer = dense if kind is nn.Linear else kind.from_dense(dense, torch.rand(90, 100) < 0.5)
        weights = [parameter.shape for parameter in layer.parameters() if parameter.dim() > 1]
        with torch.autocast("cpu", torch.bfloat16):
            run = measure._arm(layer, torch.randn(3, 100, dtype=torch.bfloat16), torch.Generator())
            with Casts() as casts:
                run(), run()
        # To the kernels values of single weights are float32.
        assert casts.shapes.count(weights[0]) == (0 if kind is SparseLinear else 2)

    @pytest.mark.parametrize(
        "milliseconds, ends",
        [
            ({"dense": [3, 3, 3], "masked": [3, 3.1, 9], "sparse": [1, 1.05, 5]}, True),
            ({"dense": [4, 4, 4], "masked": [4, 4, 4], "sparse": [8, 8, 8]}, True),
            ({"dense": [14] * 3, "masked": [14] * 3, "sparse": [10] * 3}, False),  # near
            ({"dense": [9, 9, 9], "masked": [9, 20, 20], "sparse": [3, 3, 3]}, False),  # unsettled
            ({"dense": [5, 5, 5], "masked": [15, 15, 15], "sparse": [6, 6, 6]}, False),  # masked three times dense: is it?
            ({"dense": [0.1] * 3, "masked": [0.1] * 3, "sparse": [0.02] * 3}, False),  # a moment in which others took a core
            ({"dense": [0.1] * 140, "masked": [0.1] * 140, "sparse": [0.02] * 140}, True),
            ({"dense": [0.1] * 260, "masked": [0.1] * 260, "sparse": [0.1] * 260}, False),
            ({"dense": [0.1] * 270, "masked": [0.1] * 270, "sparse": [0.1] * 270}, True),
            ({"dense": [30] * 15, "masked": [30] * 15, "sparse": [30] * 15}, True),  # enough is enough
            ({"dense": [30] * 14, "masked": [30] * 14, "sparse": [30] * 14}, False),
            ({"dense": [2000] * 3, "masked": [2000] * 3, "sparse": [2000] * 3}, True),
        ],
    )
    def test_rounds_end_when_the_answer_is_clear_or_took_long(self, milliseconds, ends):
        assert measure._decided({name: [ms / 1e3 for ms in taken] for name, taken in milliseconds.items()}) is ends


class TestSecondLook:
    """A machine that is slow for a moment, and not by one factor, is seen again some time later."""

    def test_small_layers_come_first_and_the_fastest_of_both_looks_count(self, net, stopwatch):
        looks = iter([Times(40e-3, 36e-3, 24e-3), *[Times(2e-3, 2e-3, 1e-3)] * 2, Times(0.15e-3, 0.14e-3, 0.18e-3), *[Times(3e-3, 1e-3, 2e-3)] * 2])
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


class TestCache:
    def test_the_same_layer_is_measured_once(self, net, stopwatch):
        masks = masks_of(net)
        first = gs.plan(net, masks, X)
        count = len(stopwatch.measured)
        assert count == 3 and gs.plan(net, masks, X).rows == first.rows and len(stopwatch.measured) == count

    @pytest.mark.parametrize("kept, again", [(1000, False), (1019, False), (981, False), (1030, True), (500, True)])
    def test_near_counts_of_weights_share_a_measurement(self, stopwatch, kept, again):
        model = nn.Sequential(nn.Linear(64, 64))
        for count in (1000, kept):
            gs.plan(model, {"0.weight": (torch.randperm(4096) < count).view(64, 64)}, torch.randn(8, 64))
        assert len(stopwatch.measured) == 1 + again

    def test_what_was_decided_once_is_decided_again(self, stopwatch, on_disk):
        """prune measures a step under one plan; sparsify_ must find it, though later tries have measured nearer counts."""
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
        masks = {count: {"0.weight": (torch.arange(4096) < count).view(64, 64)} for count in (1000, 1015, 1030)}
        stopwatch.set(lambda layer, kept, given: Times(1.0, 1.0, 0.5 if kept == 1000 else 2.0))
        ways = [gs.plan(model, masks[count], x)["0.weight"] for count in (1000, 1015, 1030, 1015)]
        cache._memory.clear()  # another process
        ways += [gs.plan(model, masks[count], x)["0.weight"] for count in (1015, 1030)]
        assert ways == ["sparse", "sparse", "masked", "sparse", "sparse", "masked"]

    @pytest.mark.parametrize("change", ["batch", "threads", "layout", "gradient", "stride"])
    def test_anything_else_is_measured_anew(self, stopwatch, change):
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
        masks, x = masks_of(model), torch.randn(8, 4, 6, 6)
        gs.plan(model, masks, x)
        if change == "batch":
            x = x[:4]
        elif change == "threads":
            torch.set_num_threads(2)
        elif change == "layout":
            x = x.to(memory_format=torch.channels_last)
        elif change == "gradient":
            model[0].weight.requires_grad_(False)
        else:
            model[0].stride = (2, 2)
        gs.plan(model, masks, x)
        assert len(stopwatch.measured) == 2

    @pytest.mark.parametrize("of", [torch.backends.cuda.matmul, torch.backends.cudnn.conv], ids=["products", "convolutions"])
    def test_times_on_a_gpu_are_those_of_one_precision(self, monkeypatch, of):
        """Set in the way of today, beside which torch refuses to be asked in the older one."""
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
        before, keys = of.fp32_precision, []
        try:
            for of.fp32_precision in ("ieee", "tf32"):
                keys.append(cache._device("cuda"))
        finally:
            of.fp32_precision = before
        assert keys[0] != keys[1]

    @pytest.mark.parametrize("kind, setting", [
        ("cpu", (torch.backends.mkldnn.matmul, "fp32_precision", "bf16")), ("cpu", (torch.backends.mkldnn, "deterministic", True)),
        ("cuda", (torch.backends.cudnn, "benchmark", True)), ("cuda", (torch.backends.cudnn, "deterministic", True)),
    ], ids=lambda value: value if isinstance(value, str) else value[1])  # fmt: skip
    def test_times_are_those_of_one_way_to_compute(self, monkeypatch, kind, setting):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
        where, name, value = setting
        before, key = getattr(where, name), cache._device(kind)
        try:
            setattr(where, name, value)
            assert cache._device(kind) != key
        finally:
            setattr(where, name, before)
        assert cache._device(kind) == key

    @pytest.fixture
    def on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRASP_SPARSE_CACHE", str(tmp_path / "deep" / "cache"))
        return tmp_path / "deep" / "cache" / "layer-times.json"

    def test_another_process_does_not_measure_again(self, net, stopwatch, on_disk):
        masks = masks_of(net)
        first = gs.plan(net, masks, X)
        cache._memory.clear()
        assert gs.plan(net, masks, X).rows == first.rows and len(stopwatch.measured) == 3
        assert [path.name for path in on_disk.parent.iterdir()] == [on_disk.name]

    def test_files_of_two_processes_are_joined(self, stopwatch, on_disk):
        for model in (nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 6))):
            cache._memory.clear()
            gs.plan(model, masks_of(model), torch.randn(2, 8))
        assert len(json.loads(on_disk.read_text())["times"]) == 2

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 99, "times": {}}', b'{"format": 2, "times": []}', "bad rows", "bad times"],
    )
    def test_a_damaged_or_foreign_file_is_measured_over(self, stopwatch, on_disk, content):
        model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)
        masks = masks_of(model)
        key = cache.layer_key(model[0], LayerInput((2, 8), "row-major", torch.float32, False))
        if content == "bad rows":
            content = json.dumps({"format": 2, "times": {key: [7]}}).encode()
        elif content == "bad times":
            content = json.dumps({"format": 2, "times": {key: [[6, [1, -1, 0], True]]}}).encode()
        on_disk.parent.mkdir(parents=True)
        on_disk.write_bytes(content)
        gs.plan(model, masks, x)
        assert len(stopwatch.measured) == 1 and key in json.loads(on_disk.read_text())["times"]

    def test_a_folder_that_cannot_be_written_is_done_without(self, net, stopwatch, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("GRASP_SPARSE_CACHE", str(tmp_path / "file"))
        gs.plan(net, masks_of(net), X)
        assert len(stopwatch.measured) == 3

    def test_where_the_file_is(self, monkeypatch):
        for value in ("", "0"):
            monkeypatch.setenv("GRASP_SPARSE_CACHE", value)
            assert cache.cache_file() is None
        monkeypatch.setenv("GRASP_SPARSE_CACHE", "~nobody-of-this-name/cache")
        assert cache.cache_file() is None
        monkeypatch.delenv("GRASP_SPARSE_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert str(cache.cache_file()) == "/somewhere/grasp_sparse/layer-times.json"
