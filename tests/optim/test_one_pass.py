"""The optimizer that takes one pass over each tensor: torch's fused one, or the one that masks where layers are masked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grasp_sparse import optim
from grasp_sparse.nn import MaskedLinear
from grasp_sparse.nn.masked import consumer_of


def _masked() -> MaskedLinear:
    return MaskedLinear.from_dense(nn.Linear(6, 4), torch.rand(4, 6) < 0.5)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_torchs_fused_one_unless_layers_are_masked(name: str) -> None:
    models = nn.Linear(6, 4), _masked(), nn.Sequential(nn.Linear(6, 6), _masked())
    dense, *masked = (optim.one_pass(name, model, lr=0.5) for model in models)
    assert type(dense) is getattr(torch.optim, name) and dense.defaults["fused"] and dense.defaults["lr"] == 0.5
    assert {type(one) for one in masked} == {getattr(optim, name)}


@pytest.mark.parametrize("raw_gradients", [True, False])
def test_masked_layers_leave_masking_to_it_if_they_may(raw_gradients: bool) -> None:
    model = _masked()
    optimizer = optim.one_pass("SGD", model, lr=0.5, raw_gradients=raw_gradients)
    assert (consumer_of(model.weight) is not None) == raw_gradients
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert not model.weight[~model.mask].any() and bool(model.weight.grad[~model.mask].any()) == raw_gradients


def test_complex_numbers_are_left_to_torchs_usual_one() -> None:
    model = nn.Sequential(_masked(), nn.Linear(4, 2, dtype=torch.complex64))
    optimizer = optim.one_pass("SGD", model, lr=0.5)
    assert type(optimizer) is torch.optim.SGD and not optimizer.defaults["fused"]
