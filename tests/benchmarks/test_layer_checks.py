"""Layers of a network are compared one by one in float32, and with their norms where both are one operation; what is off by a
thousandth in one entry is found and named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grasp_sparse import _extension
from grasp_sparse.bench.arms import WrongResultError, check_close
from grasp_sparse.bench.layer_checks import check_layers
from grasp_sparse.bench.pair_checks import checked_pairs
from grasp_sparse.bench.steps import check_steps, dense_steps, masked_copy, sparse_steps
from grasp_sparse.nn import SparseLayer, conv_norm_relu
from grasp_sparse.planning import Times, measure
from grasp_sparse.pruning import make_masks
from grasp_sparse.surgery import sparsify_

one_operation = pytest.mark.skipif(not _extension.status().loaded, reason="compiled kernels are not loaded")
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


class _PairsNet(nn.Module):
    """Two convolutions that run as one operation with their norms, the second with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding="same", dilation=2), nn.BatchNorm2d(16)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.classifier(conv_norm_relu(self.conv, self.norm, x, x).mean((2, 3)))


def _pairs() -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor, Tensor]]:
    """A network with zeros where pruned, the masks, a batch in channels_last."""
    model = _PairsNet()
    masks = make_masks({name: torch.rand(model.get_parameter(name).shape) for name in ("stem.0.weight", "conv.weight")}, 0.8)
    batch = torch.randn(6, 3, 9, 9).to(memory_format=torch.channels_last), torch.arange(6) % 5
    return masked_copy(model, masks).to(memory_format=torch.channels_last), masks, batch


def _sparse_pairs() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model, masks, batch = _pairs()
    sparsify_(model, masks, batch[0], dict.fromkeys(masks, "sparse"))
    return model.train(), batch


def _pass(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of the parameters, and the buffers behind it."""
    x, y = batch
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    return [*gradients, *(buffer.clone() for buffer in model.buffers())]


@one_operation
def test_pairs_are_checked_and_a_pass_gives_the_same():
    model, batch = _sparse_pairs()
    expected = _pass(copy.deepcopy(model), batch)
    with checked_pairs("sparse", model) as errors:
        got = _pass(model, batch)
    assert len(errors) == 2 and all(0 < error < 2e-6 for error in errors)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    _pass(model, batch)
    assert len(errors) == 2  # the watching has ended


@one_operation
def test_layers_that_run_one_after_the_other_are_no_pairs():
    model, (x, y) = _sparse_pairs()
    with checked_pairs("sparse", model) as errors:
        _pass(model, (x.contiguous(), y))
    assert errors == []


_PAIR_GRADIENTS = (
    "input gradient", "weight gradient", "bias gradient", "residual gradient", "norm weight gradient", "norm bias gradient"
)  # fmt: skip


@one_operation
@pytest.mark.parametrize("what", ["output", *_PAIR_GRADIENTS])
@pytest.mark.parametrize("wrongly", ["one entry", "all"])
def test_a_wrong_pair_is_refused_and_named(monkeypatch, what, wrongly):
    model, batch = _sparse_pairs()
    name = "csr_conv2d_norm_train" if what == "output" else "csr_conv2d_norm_backward"
    place = 0 if what == "output" else _PAIR_GRADIENTS.index(what)
    right, shape = getattr(torch.ops.grasp_sparse, name), model.conv.values.shape

    def off(result: Tensor) -> Tensor:
        if what == "bias gradient":  # zero but for rounding
            return result + 1e-3
        return result * 1.001 if wrongly == "all" else _off_by_a_thousandth(result)

    def wrong(values: Tensor, *arguments):
        results = right(values, *arguments)
        return tuple(off(result) if i == place and values.shape == shape else result for i, result in enumerate(results))

    wrong.default = wrong
    monkeypatch.setattr(torch.ops.grasp_sparse, name, wrong)
    with pytest.raises(WrongResultError, match=f"^sparse: layer conv and its norm: {what} differs from .*; nothing is measured"):
        with checked_pairs("sparse", model):
            _pass(model, batch)


@one_operation
def test_a_network_with_such_a_pair_is_not_measured(monkeypatch):
    monkeypatch.setattr(measure, "measure_layer", lambda *_: Times(2e-3, 2e-3, 1e-3))
    masked, masks, batch = _pairs()
    steps = dense_steps(masked, batch) | sparse_steps(masked, masks, batch)[0]
    check_steps(steps, masks)
    right = torch.ops.grasp_sparse.csr_conv2d_norm_backward

    def wrong(*arguments):
        dx, dvalues, *others = right(*arguments)
        return dx, dvalues if dvalues.dtype == torch.float64 else dvalues * 1.001, *others

    monkeypatch.setattr(torch.ops.grasp_sparse, "csr_conv2d_norm_backward", wrong)
    with pytest.raises(WrongResultError, match="sparse channels_last: layer conv and its norm: weight gradient differs"):
        check_steps(steps, masks)


def test_what_is_zero_must_be_exactly_zero():
    zeros = torch.zeros(3)
    assert check_close("arm", "output", zeros, zeros, 1e-5) == 0
    for got in (torch.tensor([0, 1e-30, 0]), torch.full((3,), torch.nan)):
        with pytest.raises(WrongResultError, match="arm: output differs from the dense layer's by (inf|nan)"):
            check_close("arm", "output", got, zeros, 1e-5)
    assert check_close("arm", "bias gradient", torch.full((3,), 1e-6), zeros, 1e-5, torch.tensor(1.0)) == pytest.approx(1e-6)
