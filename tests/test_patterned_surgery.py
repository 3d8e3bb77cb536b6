"""Switching the pattern changes no other code: prune, sparsify_, train, save, load and densify_ are the same calls under each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import grasp_sparse as gs
from fused_calls import fused_calls
from grasp_sparse import _extension, pruning
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.patterns import get_pattern
from grasp_sparse.planning import Times, cache, layer_times, measure
from grasp_sparse.planning.cost_model import layer_costs
from grasp_sparse.planning.inputs import LayerInput
from pruned_models import pruned_copy

BLOCKS = ("block(2, 2)", "block(4, 3)")
PATTERNS = (*BLOCKS, "vector(4)", "nm(1, 2)", "channel", "channel(in)", "unstructured")


def net() -> nn.Module:
    """Channels that no block divides, a norm, a residual-free chain and two linear layers with a ReLU between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(),
        nn.Conv2d(7, 10, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(90, 13), nn.ReLU(), nn.Linear(13, 5),
    )  # fmt: skip


X, Y = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 5


def masks_for(model: nn.Module, written: str) -> gs.MaskSet:
    sparsity = 0.5 if get_pattern(written).density else 0.7
    return gs.prune(model, [(X, Y)], sparsity, pattern=written, scope="layer", seed=0)  # every layer loses something


def sparsified(written: str) -> tuple[nn.Module, gs.MaskSet]:
    model = net()
    masks = masks_for(model, written)
    gs.sparsify_(model, masks, max_density=1.0)
    return model, masks


def sparse_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (SparseLinear, SparseConv2d))]


@pytest.mark.parametrize("written", PATTERNS)
class TestEveryPattern:
    def test_same_function_and_gradients_as_the_pruned_network(self, written):
        model = net().double()
        masks = masks_for(model, written)
        expected, x = pruned_copy(model, masks), X.double()
        report = gs.sparsify_(model, masks, max_density=1.0)
        assert [row.runs for row in report.rows] == ["sparse"] * 4
        assert {row.block_size for row in report.rows} == {get_pattern(written).block_size}
        assert report.kept == masks.kept == sum(layer.nnz for layer in sparse_layers(model))
        for module in (model, expected):
            module(x).square().sum().backward()
        torch.testing.assert_close(model(x), expected(x))
        for (name, mask), layer in zip(masks.items(), sparse_layers(model), strict=True):
            assert layer.block_size == get_pattern(written).block_size
            torch.testing.assert_close(layer.placed(layer.values.grad), expected.get_parameter(name).grad * mask)

    def test_training_keeps_pruned_weights_exactly_zero(self, written):
        model, masks = sparsified(written)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for mask, layer in zip(masks.values(), sparse_layers(model), strict=True):
            assert bool((layer.to_dense_weight()[~mask] == 0).all())
            assert torch.equal(layer.storage.gather(layer.to_dense_weight(), layer.indices), layer.values)
        model.eval()
        before = model(X)
        torch.testing.assert_close(gs.densify_(model)(X), before)
        assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())

    def test_densify_is_the_exact_inverse(self, written):
        model = net()
        masks = masks_for(model, written)
        expected = pruned_copy(model, masks)
        gs.sparsify_(model, masks, max_density=1.0)
        gs.densify_(model)
        assert repr(model) == repr(expected)
        assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in expected.modules()]
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())

    def test_saved_masks_and_checkpoints_bring_the_storage_back(self, written, tmp_path):
        model, masks = sparsified(written)
        model.eval()
        masks.save(tmp_path / "masks")
        again = net()
        gs.sparsify_(again, gs.MaskSet.load(tmp_path / "masks"), max_density=1.0)
        again.load_state_dict(model.state_dict())
        torch.save(model.state_dict(), tmp_path / "model")
        loaded = gs.load_sparse(net(), torch.load(tmp_path / "model", weights_only=True))
        for other in (again, loaded, copy.deepcopy(model)):
            assert repr(other) == repr(model)
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
            assert torch.equal(other.eval()(X), model(X))

    def test_the_relu_behind_a_linear_layer_is_applied_by_it(self, written):
        model, _ = sparsified(written)
        applied = fused_calls(model, X)
        assert model[6] in applied and model[8] not in applied
        assert torch.equal(model[:8](X), model[:7](X).relu())


def test_reports_say_which_blocks():
    model = net()
    masks = masks_for(model, "block(4, 3)")
    report = gs.sparsify_(model, masks, max_density=1.0)
    assert "sparse, 4x3 blocks" in str(report) and "4 sparse, 0 masked" in str(report)
    assert "blocks" not in str(gs.sparsify_(net(), masks_for(net(), "vector(4)"), max_density=1.0))
    assert "blocks" not in str(gs.sparsify_(net(), masks, max_density=0.0))  # masked layers have none


def test_shared_weights_share_blocks():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    masks = gs.prune(model, sparsity=0.5, criterion="magnitude", pattern="block(4, 4)")
    expected, x = pruned_copy(model, masks), torch.randn(3, 6)
    gs.sparsify_(model, masks, max_density=1.0)
    assert model[0].values is model[2].values and model[0].values.dim() == 3
    torch.testing.assert_close(model(x), expected(x))
    fresh = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    fresh[2].weight = fresh[0].weight
    loaded = gs.load_sparse(fresh, model.state_dict())
    assert loaded[0].values is loaded[2].values and torch.equal(loaded(x), model(x))
    gs.densify_(model)
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize("recipe", [{}, {"pattern": "unstructured"}, {"pattern": "a pattern of mine"}], ids=str)
def test_other_masks_are_stored_as_single_weights(recipe):
    model = net()
    gs.sparsify_(model, gs.MaskSet(masks_for(model, "block(2, 2)"), recipe), max_density=1.0)
    assert {layer.block_size for layer in sparse_layers(model)} == {None}


def test_masks_that_are_not_of_the_pattern_they_claim_name_the_weight_and_change_nothing():
    model = net()
    masks = {**masks_for(model, "block(4, 4)"), "6.weight": torch.rand(13, 90) < 0.5}
    with pytest.raises(ValueError, match=r"6.weight: Expected a mask of whole \[4, 4\] blocks"):
        gs.sparsify_(model, gs.MaskSet(masks, {"pattern": "block(4, 4)"}))
    assert not sparse_layers(model)


def test_layers_that_cannot_be_sparse_are_masked_under_a_block_pattern():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    masks = gs.MaskSet({"0.weight": torch.rand(4, 2, 3, 3) < 0.5}, {"pattern": "block(4, 4)"})
    assert gs.sparsify_(model, masks).rows[0].runs == "masked"


@pytest.mark.skipif(not _extension.status().loaded, reason="without compiled kernels nothing is measured")
class TestMeasuring:
    @pytest.fixture
    def measured(self, monkeypatch):
        """(weight shape, kept, block size) of every layer that is measured; sparse is always the faster."""
        seen = []

        def measure_layer(layer, mask, given, block_size=None):
            seen.append((tuple(layer.weight.shape), mask, block_size))
            return Times(2e-3, 2e-3, 1e-4 + 1e-6 * int(mask.sum()))

        monkeypatch.setattr(measure, "measure_layer", measure_layer)
        monkeypatch.setattr(layer_times, "_LONG_LOOK", 0.0)  # nothing is looked at twice
        return seen

    @pytest.mark.parametrize("written", PATTERNS)
    def test_a_plan_measures_all_that_the_pattern_can_be_stored_as(self, written, measured):
        model = net()
        plan = gs.plan(model, masks_for(model, written), X)
        storages = [get_pattern(written).block_size, None] if written in BLOCKS else [None]
        assert [block for _, _, block in measured] == storages * 4
        assert ("blocks" in str(plan)) == (written in BLOCKS)

    def test_the_fastest_storage_is_taken_each_judged_beside_the_masked_layer(self, monkeypatch):
        def measure_layer(layer, mask, given, block_size=None):
            """The machine is half as fast while single weights are measured."""
            if block_size is None:
                return Times(4e-3, 4e-3, 1.8e-3)
            return Times(2e-3, 2e-3, 1.2e-3 if isinstance(layer, nn.Linear) else 0.8e-3)

        monkeypatch.setattr(measure, "measure_layer", measure_layer)
        model = net()
        masks = masks_for(model, "block(4, 3)")
        plan = gs.plan(model, masks, X)
        assert [row.block_size for row in plan.rows] == [(4, 3), (4, 3), None, None]
        assert plan.rows[2].reason == "as 4x3 blocks it takes 1.33 times as long" and not plan.rows[0].reason
        expected = pruned_copy(model, masks).eval()
        for given in ({"example_input": X}, {"plan": plan}):  # decided again from the times, or carried out
            sparse = copy.deepcopy(model)
            report = gs.sparsify_(sparse, masks, **given)
            assert [row.block_size for row in report.rows] == [layer.block_size for layer in sparse_layers(sparse)]
            assert [layer.block_size for layer in sparse_layers(sparse)] == [(4, 3), (4, 3), None, None]
            torch.testing.assert_close(sparse.eval()(X), expected(X))
            loaded = gs.load_sparse(net(), sparse.state_dict())
            assert [layer.block_size for layer in sparse_layers(loaded)] == [(4, 3), (4, 3), None, None]

    def test_masked_is_taken_where_no_storage_is_faster(self, monkeypatch):
        monkeypatch.setattr(measure, "measure_layer", lambda layer, mask, given, block_size: Times(1e-3, 1e-3, 2e-3 if block_size else 1.5e-3))
        model = net()
        rows = gs.plan(model, masks_for(model, "block(4, 3)"), X).rows
        assert {(row.runs, row.reason) for row in rows} == {("masked", "sparse takes 1.50 of the masked time")}

    def test_times_of_one_storage_are_not_those_of_another(self, measured):
        model = net()
        kept = {name: torch.ones_like(mask) for name, mask in masks_for(model, "block(4, 3)").items()}
        kept["8.weight"][:4, :3] = False  # whole blocks of either size
        for recipe in ({"pattern": "block(4, 3)"}, {"pattern": "block(2, 3)"}, {}):
            gs.plan(model, gs.MaskSet(kept, recipe), X)
        assert [block for _, _, block in measured] == [(4, 3), None, (2, 3), None, None]

    def test_keys_tell_patterns_apart(self):
        layer, given = nn.Linear(8, 8), LayerInput((2, 8), "row-major", torch.float32, True)
        written = ("unstructured", "block(2, 4)", "block(4, 2)", "vector(2)")
        assert len({cache.layer_key(layer, given, name) for name in written}) == 4

    @pytest.mark.parametrize("written", [*BLOCKS, "vector(4)", "channel"])
    def test_costs_of_a_layer_are_those_of_its_pattern(self, written, measured):
        pattern, model = get_pattern(written), net()
        names = [f"{index}.weight" for index in (0, 3, 6, 8)]
        costs = layer_costs(model, names, X, pattern)
        assert set(costs) == set(names) and {block for _, _, block in measured} == {pattern.block_size, None}
        for shape, mask, _ in measured:
            kept, sizes = pattern.pool(mask.double()), pattern.pool(torch.ones(shape, dtype=torch.float64))
            assert bool(((kept == 0) | (kept == sizes)).all())

    def test_a_budget_of_time_hands_the_pattern_on(self, monkeypatch):
        seen = {}

        def search(model, masks_at, sparsest, names, batch, speedup, loss_fn, pattern, *made_with):
            seen.update(pattern=pattern, most=sparsest(dict.fromkeys(names, 1e-6)))
            return masks_at(seen["most"], dict.fromkeys(names, 1e-6))

        monkeypatch.setattr(pruning, "time_search", search)
        masks = gs.prune(net(), [(X, Y)], pattern="block(4, 3)", budget="time", speedup=2.0, criterion="magnitude")
        assert seen["pattern"] == get_pattern("block(4, 3)")
        assert all(mask.any() for mask in masks.values()) and masks.sparsity >= seen["most"]

    def test_block_layers_are_measured_for_real(self):
        model = nn.Sequential(nn.Linear(64, 48))
        masks = gs.prune(model, sparsity=0.5, criterion="magnitude", pattern="block(16, 16)")
        times = measure.measure_layer(
            model[0], masks["0.weight"], LayerInput((4, 64), "row-major", torch.float32, True), (16, 16), rounds=2
        )
        assert min(times) > 0
