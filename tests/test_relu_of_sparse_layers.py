"""Sparse layers apply the ReLU behind them where nobody sees what lies between the two."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_calls import classes, fused_calls, step
from grasp_sparse.fusion import unfuse_
from grasp_sparse.nn import SparseConv2d
from grasp_sparse.pruning import make_masks
from grasp_sparse.surgery import densify_, load_sparse, sparsify_
from pruned_models import pruned_copy


def _mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), *layers, nn.Linear(30, 30), nn.ReLU(inplace=True), nn.Linear(30, 4)).double()


def _masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters() if p.dim() == 2}


def test_sparse_linear_applies_the_relu_behind_it():
    model = _mlp(nn.Dropout(0.0))
    masks = _masks(model)
    stock = pruned_copy(model, masks)
    x = torch.randn(7, 20, dtype=torch.float64)
    sparsify_(model, masks, max_density=1.0)
    assert fused_calls(model, x) == [model[0], model[3]]
    got, want = step(model, x), step(stock, x)
    results = ["y", "x", *(name for name, _ in stock.named_parameters())]
    for name, actual, expected in zip(results, got[: len(results)], want[: len(results)], strict=True):
        torch.testing.assert_close(actual, expected[masks[name]].unsqueeze(0) if name in masks else expected)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert len(fused_calls(copied, x)) == 2
    torch.testing.assert_close(copied(x), want[0])

    loaded = load_sparse(_mlp(nn.Dropout(0.0)), model.state_dict())
    assert len(fused_calls(loaded, x)) == 2
    torch.testing.assert_close(loaded(x), want[0])

    unfused = unfuse_(copy.deepcopy(model))
    torch.testing.assert_close(unfused(x), want[0])
    assert fused_calls(unfused, x) == [] and type(unfused) is nn.Sequential

    densify_(model)
    assert classes(model) == classes(stock)
    torch.testing.assert_close(model(x), want[0])


@pytest.mark.parametrize("why", ["hook on the layer", "hook on the ReLU", "masked layer"])
def test_relu_stays_where_something_would_see_the_difference(why):
    model, x = _mlp(), torch.randn(3, 20, dtype=torch.float64)
    if why == "hook on the layer":
        model[0].register_forward_hook(lambda *_: None)
    elif why == "hook on the ReLU":
        model[1].register_forward_pre_hook(lambda *_: None)
    masks = _masks(model)
    expected = pruned_copy(model, masks)(x)
    runs = {name: "masked" if why == "masked layer" and name == "0.weight" else "sparse" for name in masks}
    sparsify_(model, masks, plan=runs)
    assert fused_calls(model, x) == [model[2]]
    torch.testing.assert_close(model(x), expected)


def test_sparse_convolution_of_blocks_applies_the_relu_behind_it():
    """One of single weights does not: its kernels have no ReLU."""

    def model() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 4)
        ).double()  # fmt: skip

    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    for pattern, fused in (("block(2, 2)", 2), ("unstructured", 0)):
        sparse = model()
        masks = make_masks({name: p.detach().abs() for name, p in sparse.named_parameters() if p.dim() == 4}, 0.5, pattern)
        stock = pruned_copy(sparse, masks)
        sparsify_(sparse, masks, max_density=1.0)
        convs = [module for module in sparse if isinstance(module, SparseConv2d)]
        assert fused_calls(sparse, x) == convs[:fused]
        got, want = step(sparse, x), step(stock, x)
        torch.testing.assert_close((got[0], got[1], got[-1]), (want[0], want[1], want[-1]))
        loaded = load_sparse(model(), sparse.state_dict())
        torch.testing.assert_close(loaded(x), want[0])
        assert [type(module) for module in loaded] == [type(module) for module in sparse]
        unfused = unfuse_(copy.deepcopy(sparse))
        torch.testing.assert_close(unfused(x), want[0])
        assert fused_calls(unfused, x) == []
        densify_(sparse)
        assert classes(sparse) == classes(stock)
        torch.testing.assert_close(sparse(x), want[0])


def test_relu_of_single_weights_is_refused():
    conv = SparseConv2d.from_dense(nn.Conv2d(3, 4, 3), torch.ones(4, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="Expected relu with values of whole blocks only"):
        conv(torch.randn(2, 3, 5, 5), relu=True)
