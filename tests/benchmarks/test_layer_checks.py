"""Layers of a network are compared one by one in float32; what is off by a thousandth in one entry is found and named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grasp_sparse.bench.arms import WrongResultError, check_close
from grasp_sparse.bench.layer_checks import check_layers
from grasp_sparse.bench.steps import check_steps, dense_steps, masked_copy, sparse_steps
from grasp_sparse.nn import SparseLayer
from grasp_sparse.planning import Times, measure
from grasp_sparse.pruning import make_masks
from grasp_sparse.surgery import sparsify_

# One ReLU is in place; the convolutions pad in two ways.
LAYERS = ("0", "3", "7", "9")


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 12, 3, stride=2, padding=(1, 2), padding_mode="reflect"), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


def _networks(pattern: str = "unstructured") -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Dense with zeros where pruned, the same one sparse, a batch."""
    model = _net()
    masks = make_masks({f"{name}.weight": torch.rand(model.get_parameter(f"{name}.weight").shape) for name in LAYERS}, 0.5, pattern)
    batch = torch.randn(6, 3, 9, 9), torch.arange(6) % 5
    dense = masked_copy(model, masks)
    sparse = copy.deepcopy(dense)
    sparsify_(sparse, masks, batch[0], dict.fromkeys(masks, "sparse"))
    assert sum(isinstance(layer, SparseLayer) for layer in sparse.modules()) == len(LAYERS)
    return dense, sparse, batch


def _check(dense: nn.Module, sparse: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    x, y = batch
    return check_layers(lambda: nn.functional.cross_entropy(dense(x), y).backward(), dense, {"sparse nchw": sparse})


@pytest.mark.parametrize("pattern", ["unstructured", "block(4, 3)"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_a_correct_network_passes(pattern, layout):
    dense, sparse, (x, y) = _networks(pattern)
    dense, sparse = dense.to(memory_format=layout), sparse.to(memory_format=layout)
    assert 0 < _check(dense, sparse, (x.contiguous(memory_format=layout), y)) < 2e-6
    assert not any(module._forward_hooks for model in (dense, sparse) for module in model.modules())
    assert all(parameter.grad is None for parameter in sparse.parameters())


def _off_by_a_thousandth(result: Tensor) -> Tensor:
    """One entry is, and not one of the large ones."""
    result = result.clone()
    flat = result.flatten()  # a copy or a view, as the memory format has it
    place = flat.abs().sort().indices[2 * flat.numel() // 3]
    flat[place] *= 1.001
    return result.copy_(flat.view_as(result))


_OPERATIONS = {  # layer -> forward, backward
    "3": ("csr_conv2d_fprop", "csr_conv2d_backward"),
    "7": ("csr_spmm", "csr_spmm_backward"),
}


@pytest.mark.parametrize("layer", _OPERATIONS)
@pytest.mark.parametrize("what", ["input gradient", "weight gradient", "bias gradient", "output"])
def test_one_wrong_entry_is_refused_and_named(monkeypatch, layer, what):
    dense, sparse, batch = _networks()
    forward, backward = _OPERATIONS[layer]
    name = forward if what == "output" else backward
    right, shape = getattr(torch.ops.grasp_sparse, name), sparse.get_submodule(layer).values.shape

    def wrong(values: Tensor, *arguments):
        results = right(values, *arguments)
        if values.shape != shape:
            return results
        if what == "output":
            return _off_by_a_thousandth(results)
        place = ("input gradient", "weight gradient", "bias gradient").index(what)
        return tuple(_off_by_a_thousandth(result) if i == place else result for i, result in enumerate(results))

    _check(dense, sparse, batch)
    wrong.default = wrong  # as operations have their overloads
    monkeypatch.setattr(torch.ops.grasp_sparse, name, wrong)
    with pytest.raises(WrongResultError, match=f"^sparse nchw: layer {layer}: {what} differs from .*; nothing is measured"):
        _check(dense, sparse, batch)
    assert not any(module._forward_hooks for module in dense.modules())


def test_a_network_with_such_a_layer_is_not_measured(monkeypatch):
    """What no comparison of whole steps sees in float32."""
    monkeypatch.setattr(measure, "measure_layer", lambda *_: Times(2e-3, 2e-3, 1e-3))  # whatever they take, layers run sparse
    model, batch = _net(), (torch.randn(6, 3, 9, 9), torch.arange(6) % 5)
    masks = make_masks({f"{name}.weight": torch.rand(model.get_parameter(f"{name}.weight").shape) for name in LAYERS}, 0.8)
    masked = masked_copy(model, masks)
    steps = dense_steps(masked, batch) | sparse_steps(masked, masks, batch)[0]
    check_steps(steps, masks)
    right = torch.ops.grasp_sparse.csr_conv2d_wgrad  # of the first layer, whose input needs no gradient

    def wrong(*arguments):
        result = right(*arguments)
        return result if result.dtype == torch.float64 else _off_by_a_thousandth(result)

    wrong.default = wrong
    monkeypatch.setattr(torch.ops.grasp_sparse, "csr_conv2d_wgrad", wrong)
    with pytest.raises(WrongResultError, match="sparse nchw: layer 0: weight gradient differs"):
        check_steps(steps, masks)


def test_what_is_zero_must_be_exactly_zero():
    zeros = torch.zeros(3)
    assert check_close("arm", "output", zeros, zeros, 1e-5) == 0
    for got in (torch.tensor([0, 1e-30, 0]), torch.full((3,), torch.nan)):
        with pytest.raises(WrongResultError, match="arm: output differs from the dense layer's by (inf|nan)"):
            check_close("arm", "output", got, zeros, 1e-5)
    assert check_close("arm", "bias gradient", torch.full((3,), 1e-6), zeros, 1e-5, torch.tensor(1.0)) == pytest.approx(1e-6)
