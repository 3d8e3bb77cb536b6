"""Surgery changes how a model computes, not what: same function, same references, and back again exactly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import grasp_sparse as gs
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLayer, SparseLinear
from pruned_models import pruned_copy


class Net(nn.Module):
    """A little of everything: convolutions, grouped ones, norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same", bias=False))
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.grouped(self.body(self.stem(x))).mean((2, 3)))


DENSITIES = {"stem.weight": 0.8, "body.2.weight": 0.2, "grouped.weight": 0.2, "head.weight": 0.1}


def masks_for(model: nn.Module, densities: dict[str, float]) -> dict[str, torch.Tensor]:
    """Random masks that keep exactly these shares, so that the density limit decides the same at every seed."""
    parameters = dict(model.named_parameters())
    return {
        name: (torch.randperm(parameters[name].numel()) < density * parameters[name].numel()).view(parameters[name].shape)
        for name, density in densities.items()
    }


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def masks(net):
    return masks_for(net, DENSITIES)


def test_sparse_model_computes_the_pruned_one(net, masks):
    expected, x = pruned_copy(net, masks), torch.randn(4, 3, 6, 6)
    report = gs.sparsify_(net, masks, x, plan="density")
    torch.testing.assert_close(net(x), expected(x))
    assert [type(m) for m in (net.stem, net.body[2], net.grouped, net.head)] == [MaskedConv2d, SparseConv2d, MaskedConv2d, SparseLinear]
    assert [(row.name, row.runs, row.reason) for row in report.rows] == [
        ("stem", "masked", "density above 0.3"),
        ("body.2", "sparse", ""),
        ("grouped", "masked", "2 groups"),
        ("head", "sparse", ""),
    ]


def test_densify_is_the_exact_inverse(net, masks):
    expected = pruned_copy(net, masks)
    gs.sparsify_(net, masks)
    assert gs.densify_(net) is net
    assert same_state(net, expected)
    assert [type(m) for m in net.modules()] == [type(m) for m in expected.modules()]
    assert repr(net) == repr(expected)
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(net(x), expected(x))
    gs.sparsify_(net, masks)
    assert isinstance(net.head, SparseLinear)


def test_densify_leaves_nothing_sparse_behind(net, masks):
    net.head.note = "mine"
    gs.sparsify_(net, masks, max_density=0.5)
    fresh = Net()
    fresh.head.note = "mine"
    for dense, expected in zip(gs.densify_(net).modules(), fresh.modules(), strict=True):
        got, wanted = vars(dense), vars(expected)
        assert got.keys() == wanted.keys() and got["_parameters"].keys() == wanted["_parameters"].keys()
        plain = wanted.keys() - {"_parameters", "_buffers", "_modules"}
        assert {name: got[name] for name in plain} == {name: wanted[name] for name in plain}
        assert got["_buffers"].keys() == wanted["_buffers"].keys()


@pytest.mark.parametrize("max_density, kinds", [(0.0, MaskedLinear), (1.0, SparseLinear)])
def test_max_density_decides(net, masks, max_density, kinds):
    gs.sparsify_(net, masks, max_density=max_density)
    assert type(net.head) is kinds
    with pytest.raises(ValueError, match=r"max_density in \[0, 1\], got 2"):
        gs.sparsify_(net, {}, max_density=2)


def test_layers_that_lose_nothing_or_have_no_mask_stay_ordinary(net):
    masks = {"stem.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool), "head.weight": torch.zeros(10, 8, dtype=torch.bool)}
    report = gs.sparsify_(net, masks)
    reasons = {row.name: (row.runs, row.reason) for row in report.rows}
    assert reasons["stem"] == ("dense", "nothing pruned") and reasons["grouped"] == ("dense", "no mask")
    assert type(net.stem) is nn.Conv2d and net.head.nnz == 0
    assert net(torch.randn(2, 3, 6, 6)).equal(net.head.bias.expand(2, -1))


def test_report_counts_and_prints(net, masks):
    report = gs.sparsify_(net, gs.MaskSet(masks, skipped=[("body.0", "a norm")]), torch.randn(4, 3, 6, 6), plan="density")
    assert report.kept == sum(int(mask.sum()) for mask in masks.values())
    assert report.weights == sum(mask.numel() for mask in masks.values())
    assert report.density == report.kept / report.weights
    rows = {row.name: row for row in report.rows}
    assert rows["head"].input_shape == (4, 8) and rows["head"].kept == int(masks["head.weight"].sum())
    assert rows["body.0"].reason == "a norm"
    text = str(report)
    assert "body.2" in text and "8x8x3x3" in text and "4x8x6x6" in text and "2 sparse, 2 masked" in text
    assert "input" not in str(gs.sparsify_(Net(), masks)).splitlines()[0]


def test_example_input_leaves_the_model_untouched(net):
    net.body[0].train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, state = torch.randn(4, 3, 6, 6), torch.get_rng_state()
    gs.sparsify_(net, {}, x)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state) and net.body[0].training


class TestWhatIsKept:
    def test_references_hooks_modes_and_attributes(self, net, masks):
        seen = []
        handle = net.head.register_forward_hook(lambda *_: seen.append("forward"))
        net.head.register_full_backward_hook(lambda *_: seen.append("backward"))
        net.head.note = "mine"
        net.body.eval()
        head, bias = net.head, net.head.bias
        gs.sparsify_(net, masks)
        assert net.head is head and head.bias is bias and head.note == "mine"
        assert not net.body[2].training and net.head.training
        net(torch.randn(2, 3, 6, 6)).sum().backward()
        assert seen == ["forward", "backward"]
        gs.densify_(net)
        handle.remove()
        net(torch.randn(2, 3, 6, 6)).sum().backward()
        assert seen == ["forward", "backward", "backward"]

    def test_marks_on_weights(self, net, masks):
        """By which people sort parameters into an optimizer's groups."""
        for name in masks:
            net.get_parameter(name).decay = name
        gs.sparsify_(net, masks)
        layers = {"stem": MaskedConv2d, "body.2": SparseConv2d, "grouped": MaskedConv2d, "head": SparseLinear}
        for name, kind in layers.items():
            layer = net.get_submodule(name)
            assert type(layer) is kind and (layer.values if kind in (SparseConv2d, SparseLinear) else layer.weight).decay == f"{name}.weight"
        assert not hasattr(net.head.bias, "decay")
        gs.densify_(net)
        assert all(net.get_parameter(name).decay == name for name in masks)

    def test_frozen_weights_and_dtype(self, net, masks):
        net.double()
        net.head.weight.requires_grad_(False)
        gs.sparsify_(net, masks)
        assert not net.head.values.requires_grad and net.head.bias.requires_grad
        assert {p.dtype for p in net.parameters()} == {torch.float64}
        gs.densify_(net)
        assert not net.head.weight.requires_grad and net.stem.weight.requires_grad

    def test_one_module_in_two_places_stays_one(self):
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.ReLU(), layer)
        report = gs.sparsify_(model, masks_for(model, {"0.weight": 0.2}))
        assert model[0] is model[2] is layer and isinstance(layer, SparseLinear)
        assert len(report.rows) == 1 and len(list(model.parameters())) == 2

    def test_the_model_may_be_one_layer(self):
        model = nn.Linear(6, 4)
        gs.sparsify_(model, masks_for(model, {"weight": 0.25}))
        assert isinstance(model, SparseLinear)
        state = model.state_dict()
        assert torch.equal(gs.load_sparse(nn.Linear(6, 4), state).values, model.values)


@pytest.mark.parametrize("density", [0.3, 0.8], ids=["sparse", "masked"])
class TestSharedWeights:
    def _tied(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    def test_sharing_survives_both_ways(self, density):
        model = self._tied()
        masks = masks_for(model, {"0.weight": density})
        expected, x = pruned_copy(model, masks), torch.randn(3, 6)
        report = gs.sparsify_(model, masks)
        kind, name = (SparseLinear, "values") if density < 0.3 else (MaskedLinear, "weight")
        assert type(model[0]) is type(model[2]) is kind
        assert getattr(model[0], name) is getattr(model[2], name)
        assert all(a is b for a, b in zip(model[0].buffers(), model[2].buffers(), strict=True))
        assert model[0].bias is not model[2].bias
        assert report.rows[1].reason == "shares the weight of 0" and report.weights == 36
        torch.testing.assert_close(model(x), expected(x))
        gs.densify_(model)
        assert model[0].weight is model[2].weight and same_state(model, expected)

    def test_deepcopy_and_checkpoints_keep_it(self, density):
        model = self._tied()
        gs.sparsify_(model, masks_for(model, {"0.weight": density}))
        loaded = gs.load_sparse(self._tied(), model.state_dict())
        for other in (copy.deepcopy(model), loaded):
            assert len(list(other.parameters())) == 3
            assert same_state(other, model)
        other = self._tied()
        gs.sparsify_(other, masks_for(other, {"0.weight": density}))
        other.load_state_dict(model.state_dict())
        assert len(list(other.parameters())) == 3 and same_state(other, model)

    def test_masks_for_both_names_must_agree(self, density):
        model = self._tied()
        masks = masks_for(model, {"0.weight": density})
        with pytest.raises(ValueError, match="2.weight: Expected the same mask"):
            gs.sparsify_(model, {**masks, "2.weight": ~masks["0.weight"]})
        gs.sparsify_(model, {**masks, "2.weight": masks["0.weight"].clone()})


def _wrong(change):
    def build():
        model = Net()
        masks = masks_for(model, DENSITIES)
        change(model, masks)
        return model, masks

    return build


def _share_with_an_embedding(net, masks):
    net.table = nn.Embedding(10, 8)
    net.table.weight = net.head.weight


def _parametrize_bias(net, masks):
    nn.utils.parametrize.register_parametrization(net.head, "bias", nn.Identity())


REFUSED = {
    "unknown name": (lambda net, m: m.update({"nowhere.weight": m["head.weight"]}), "got nowhere.weight"),
    "wrong shape": (lambda net, m: m.update({"head.weight": torch.ones(10, 9).bool()}), r"head.weight: Expected .* shape \[10, 8\]"),
    "not bool": (lambda net, m: m.update({"head.weight": torch.ones(10, 8)}), "got torch.float32"),
    "not a tensor": (lambda net, m: m.update({"head.weight": None}), "got NoneType"),
    "bias": (lambda net, m: m.update({"head.bias": torch.ones(10).bool()}), "head .Linear.: .* hold the masked 'bias'"),
    "norm": (lambda net, m: m.update({"body.0.weight": torch.ones(8).bool()}), "body.0 .BatchNorm2d.: Expected nn.Linear or nn.Conv2d"),
    "shared with an embedding": (_share_with_an_embedding, "table .Embedding.: Expected nn.Linear or nn.Conv2d"),
    "parametrized": (lambda net, m: nn.utils.parametrizations.weight_norm(net.head), "got head.weight"),
    "parametrized bias": (_parametrize_bias, "head .ParametrizedLinear.: Expected nn.Linear or nn.Conv2d"),
    "hook on the weight": (lambda net, m: net.head.weight.register_hook(lambda grad: grad), "hooks on the weight"),
    "own forward": (lambda net, m: setattr(net.head, "forward", lambda x: x), "forward of its class"),
    "extra buffer": (lambda net, m: net.head.register_buffer("scale", torch.ones(1)), "only a weight and a bias"),
    "sparse already": (lambda net, m: gs.sparsify_(net, {"head.weight": m["head.weight"]}), "call densify_ first"),
    "masked already": (lambda net, m: gs.sparsify_(net, {"stem.weight": m["stem.weight"]}), "call densify_ first"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refusal_comes_before_any_change(change, message):
    model, masks = _wrong(change)()
    kinds = [type(module) for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        gs.sparsify_(model, masks)
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_example_that_does_not_fit_changes_nothing(net, masks):
    with pytest.raises(RuntimeError):
        gs.sparsify_(net, masks, torch.randn(1, 4, 6, 6))
    assert type(net.head) is nn.Linear


class TestLoadSparse:
    def test_rebuilds_structure_from_the_checkpoint_alone(self, net, masks, tmp_path):
        gs.sparsify_(net, masks)
        torch.save(net.state_dict(), tmp_path / "model.pt")
        fresh = Net()
        assert gs.load_sparse(fresh, torch.load(tmp_path / "model.pt", weights_only=True)) is fresh
        assert same_state(fresh, net)
        assert [type(m) for m in fresh.modules()] == [type(m) for m in net.modules()]
        x = torch.randn(4, 3, 6, 6)
        assert torch.equal(fresh(x), net(x))

    @pytest.mark.parametrize("place", ["everything", "a bias", "a running mean"])
    def test_a_model_without_memory_is_told_to_get_some(self, net, masks, place):
        gs.sparsify_(net, masks)
        fresh = Net()
        if place == "everything":
            fresh.to("meta")
        elif place == "a bias":
            fresh.head.bias = nn.Parameter(fresh.head.bias.to("meta"))
        else:
            norm = next(module for module in fresh.modules() if isinstance(module, nn.BatchNorm2d))
            norm.running_mean = norm.running_mean.to("meta")
        with pytest.raises(ValueError, match=r"Expected a model with memory .* on the meta device: call model\.to_empty"):
            gs.load_sparse(fresh, net.state_dict())
        assert type(fresh.head) is nn.Linear
        assert same_state(gs.load_sparse(fresh.to_empty(device="cpu"), net.state_dict()), net)

    def test_dense_checkpoint_loads_too(self, net):
        assert same_state(gs.load_sparse(Net(), net.state_dict()), net)

    def test_values_take_the_dtype_of_the_model(self, net, masks):
        gs.sparsify_(net.double(), masks)
        assert gs.load_sparse(Net(), net.state_dict()).head.values.dtype == torch.float32

    BROKEN = {
        "missing": (lambda s: s.pop("body.0.bias"), "missing key 'body.0.bias'"),
        "missing bias of a sparse layer": (lambda s: s.pop("head.bias"), "missing key 'head.bias'"),
        "missing indices": (lambda s: s.pop("head.col_indices"), "head: Expected tensors .* none for col_indices"),
        "unexpected": (lambda s: s.update(other=torch.ones(1)), "unexpected key 'other'"),
        "unexpected weight": (lambda s: s.update({"head.weight": torch.ones(10, 8)}), "unexpected key 'head.weight'"),
        "shape": (lambda s: s.update({"head.bias": torch.ones(9)}), r"head.bias: Expected shape \[10\], got \[9\]"),
        "values": (lambda s: s.update({"head.values": torch.ones(1, 1)}), "head: Expected floating-point values"),
        "column": (lambda s: s["body.2.col_indices"].__setitem__(0, 72), r"body.2: Expected col_indices in \[0, 72\)"),
        "mask": (lambda s: s.update({"stem.mask": torch.ones(8, 3, 3, 3)}), "stem.mask: Expected a bool tensor"),
        "sparse where the model is not": (lambda s: s.update({"body.0.values": torch.ones(1, 1)}), "unexpected key 'body.0.values'"),
    }

    @pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
    def test_a_checkpoint_that_does_not_fit_changes_nothing(self, net, masks, change, message):
        gs.sparsify_(net, masks)
        state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        change(state)
        fresh = Net()
        before = copy.deepcopy(fresh)
        with pytest.raises(ValueError, match=message):
            gs.load_sparse(fresh, state)
        assert same_state(fresh, before) and not any(isinstance(m, SparseLayer) for m in fresh.modules())

    def test_two_structures_for_one_shared_weight(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        gs.sparsify_(model, masks_for(model, {"0.weight": 0.3, "1.weight": 0.3}))
        tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        tied[1].weight = tied[0].weight
        with pytest.raises(ValueError, match="0, 1: Expected one structure"):
            gs.load_sparse(tied, model.state_dict())

    def test_a_sparse_model_is_refused(self, net, masks):
        gs.sparsify_(net, masks)
        with pytest.raises(ValueError, match="Expected a dense model"):
            gs.load_sparse(net, net.state_dict())


def test_a_layer_whose_weight_is_computed_is_not_densified(net, masks):
    """What it computes would be lost, or its parts left behind as parameters of nobody."""
    gs.sparsify_(net, masks, max_density=0)
    nn.utils.parametrize.register_parametrization(net.head, "weight", nn.Identity())
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match="got weight of head computed from others: call .*remove_parametrizations"):
        gs.densify_(net)
    assert [type(module) for module in net.modules()] == kinds
    nn.utils.parametrize.remove_parametrizations(net.head, "weight")
    nn.utils.prune.identity(net.stem, "bias")
    with pytest.raises(ValueError, match="got bias of stem computed from others: .*prune.remove"):
        gs.densify_(net)
    nn.utils.prune.remove(net.stem, "bias")
    assert type(gs.densify_(net).head) is nn.Linear


def test_all_matrices_of_a_layer_that_stays_dense_count():
    model = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 5, num_layers=2))
    masks = gs.prune(model, criterion="magnitude", sparsity=0.5)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    report = gs.sparsify_(model, masks)
    assert (report.weights, report.kept) == (matrices, matrices - 16)
    assert [row.density for row in report.rows] == [0.5, 1.0]
