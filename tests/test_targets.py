"""What surgery is about to change is looked at first, and what would go wrong refused while nothing has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grasp_sparse as gs
from grasp_sparse.targets import find_targets

MASKS = {"0.weight": torch.arange(24).view(4, 6) % 6 == 0}


def test_weights_without_values_are_refused():
    model = nn.Sequential(nn.Linear(6, 4, device="meta"))
    for use in (find_targets, gs.sparsify_):
        with pytest.raises(ValueError, match=r"Expected weights with values, got '0\.weight' on the meta device: call model\.to_empty"):
            use(model, MASKS)
    assert type(model[0]) is nn.Linear
