"""What surgery is about to change is looked at first, and what would go wrong refused while nothing has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grasp_sparse as gs
from grasp_sparse import targets
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from grasp_sparse.targets import find_targets

MASKS = {"0.weight": torch.arange(24).view(4, 6) % 6 == 0}


def test_weights_without_values_are_refused():
    model = nn.Sequential(nn.Linear(6, 4, device="meta"))
    for use in (find_targets, gs.sparsify_):
        with pytest.raises(ValueError, match=r"Expected weights with values, got '0\.weight' on the meta device: call model\.to_empty"):
            use(model, MASKS)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("name", ["values", "mask", "indices", "crow_indices", "block_size", "density", "to_dense"])
def test_attributes_that_would_hide_those_of_a_pruned_layer_are_refused(name):
    model = nn.Sequential(nn.Linear(6, 4))
    setattr(model[0], name, torch.ones(2))
    with pytest.raises(ValueError, match=rf"0 \(Linear\): Expected no attribute by a name of pruned layers, got {name}; rename"):
        gs.sparsify_(model, MASKS)
    assert type(model[0]) is nn.Linear and torch.equal(getattr(model[0], name), torch.ones(2))


@pytest.mark.parametrize("kind", [SparseLinear, MaskedLinear, SparseConv2d, MaskedConv2d])
def test_every_name_that_pruned_layers_add_is_among_the_refused(kind):
    linear = kind in (SparseLinear, MaskedLinear)
    dense, x = (nn.Linear(3, 2), torch.randn(2, 3)) if linear else (nn.Conv2d(3, 2, 1), torch.randn(2, 3, 4, 4))
    layer = kind.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))
    layer(x).sum().backward()
    added = {*vars(layer), *layer._parameters, *layer._buffers} - {*vars(dense), *dense._parameters}
    assert added <= targets._TAKEN, added - targets._TAKEN


def test_other_attributes_stay():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].name = "head"
    gs.sparsify_(model, MASKS)
    assert model[0].name == "head" and model[0].nnz == 4
    assert gs.sparsify_(gs.densify_(model), MASKS) and model[0].name == "head"
