"""A state_dict carries the structure; a corrupt one changes nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layer_cases import random_mask, sparse_of
from torch import nn

from grasp_sparse.nn import MaskedLinear


def _layer(kept: int = 72) -> nn.Module:
    dense = nn.Linear(20, 12)
    return sparse_of(dense, (torch.randperm(240) < kept).view(12, 20))


def _same(a: nn.Module, b: nn.Module) -> bool:
    tensors = zip((a.values, a.bias, *a.indices), (b.values, b.bias, *b.indices), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors)


def test_keys():
    assert list(_layer().state_dict()) == ["values", "bias", "crow_indices", "col_indices"]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("kept", [0, 72, 240])
def test_checkpoint_of_another_structure_can_be_loaded(kept, assign):
    source, target = _layer(kept), _layer(kept)
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    target.load_state_dict(torch.load(stream, weights_only=True), assign=assign)
    assert _same(source, target)
    assert source.values.data_ptr() != target.values.data_ptr() or source.nnz == 0
    x = torch.randn(5, 20, requires_grad=True)
    target(x).sum().backward()
    assert target.values.grad.shape == (1, source.nnz)


def test_state_dict_given_is_not_changed():
    source = _layer()
    state = {name: tensor.long() if "indices" in name else tensor for name, tensor in source.state_dict().items()}
    target = _layer()
    target.load_state_dict(state)
    assert state["crow_indices"].dtype == torch.int64
    assert _same(source, target)


def test_another_number_of_weights_is_refused_before_an_optimizer_can_overrun():
    """Fused optimizers trust that moments have the size of the parameter: accepting this once corrupted the heap."""
    source, target = nn.Sequential(_layer(120)), nn.Sequential(_layer(72))
    before = copy.deepcopy(target)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1, momentum=0.9, fused=True)
    target(torch.randn(5, 20)).sum().backward()
    with pytest.raises(RuntimeError, match="0: Expected a checkpoint with nnz = 72 weights, got 120; .*load_sparse"):
        target.load_state_dict(source.state_dict())
    assert _same(target[0], before[0])
    optimizer.step()
    assert not torch.equal(target[0].values, before[0].values)


def _broken(change) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in _layer(120).state_dict().items()}
    change(state)
    return state


CORRUPT = {
    "column out of bounds": lambda s: s["col_indices"].__setitem__(3, 20),
    "negative column": lambda s: s["col_indices"].__setitem__(3, -1),
    "rows fall": lambda s: s["crow_indices"].__setitem__(3, 10_000),
    "crow too short": lambda s: s.update(crow_indices=s["crow_indices"][:-1]),
    "cols too short": lambda s: s.update(col_indices=s["col_indices"][:-1]),
    "values too short": lambda s: s.update(values=s["values"][:, :-1]),
    "values 1-D": lambda s: s.update(values=s["values"][0]),
    "values integer": lambda s: s.update(values=s["values"].int()),
    "indices float": lambda s: s.update(col_indices=s["col_indices"].float()),
    "indices missing": lambda s: s.pop("col_indices"),
    "values missing": lambda s: s.pop("values"),
    "not a tensor": lambda s: s.update(crow_indices=[0, 1]),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("change", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_checkpoint_names_the_layer_and_changes_nothing(change, strict):
    model = nn.Sequential(nn.ReLU(), _layer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {f"1.{name}": tensor for name, tensor in _broken(change).items()}
    with pytest.raises(RuntimeError, match="1: Expected"):
        model.load_state_dict(state, strict=strict)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model(torch.randn(2, 20)).sum().backward()


def test_missing_layer_is_reported_as_usual():
    model = nn.Sequential(_layer())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    assert model.load_state_dict({}, strict=False).missing_keys == ["0.values", "0.bias", "0.crow_indices", "0.col_indices"]


def test_masked_layer_stores_its_mask_and_zeros_what_a_checkpoint_brings():
    dense = nn.Linear(20, 12)
    source = MaskedLinear.from_dense(dense, random_mask(dense))
    target = MaskedLinear.from_dense(dense, random_mask(dense))
    assert list(source.state_dict()) == ["weight", "bias", "mask"]
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight) and torch.equal(target.mask, source.mask)
    target.load_state_dict({"weight": torch.ones(12, 20)}, strict=False)
    assert torch.equal(target.weight, source.mask.float())


def test_assigning_a_state_to_a_masked_layer_writes_into_no_tensor_of_its_source():
    source = nn.Linear(20, 12)
    given = source.state_dict()
    before = {name: tensor.clone() for name, tensor in given.items()}
    mask = random_mask(source)
    layer = MaskedLinear.from_dense(nn.Linear(20, 12), mask)
    layer.weight.requires_grad_(False)
    layer.load_state_dict(given, assign=True, strict=False)
    assert torch.equal(layer.weight, torch.where(mask, before["weight"], 0)) and not layer.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert list(given) == list(before)


@pytest.mark.parametrize("make", [sparse_of, MaskedLinear.from_dense], ids=["sparse", "masked"])
def test_what_is_loaded_in_inference_mode_can_be_trained(make):
    """As a dense layer can, which copies into the memory it has."""
    mask = random_mask(nn.Linear(20, 12))
    source, target = make(nn.Linear(20, 12), mask), make(nn.Linear(20, 12), mask.roll(1))
    with torch.inference_mode():
        target.load_state_dict(source.state_dict())
    x, results = torch.randn(5, 20), []
    for layer in (source, target):
        layer(x).square().sum().backward()
        results.append((layer(x), next(layer.parameters()).grad))
    assert torch.equal(source.to_dense_weight(), target.to_dense_weight())
    torch.testing.assert_close(*results)
